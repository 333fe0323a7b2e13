"""Percentiles mean what the tables say they mean."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.statistics import Repeated, Spread, percentile

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(VALUES, st.floats(0, 100))
def test_a_percentile_is_numpys_default(values, percent):
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_no_values_have_no_percentile():
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)
    assert Spread.of([]) is None
    assert Repeated.of([]) is None


def test_rounds_keep_their_median_and_extremes():
    assert Repeated.of([3.0, 1.0, 2.0]) == Repeated(median=2.0, least=1.0, most=3.0)

"""Sizes of a step: few, never smaller than asked, and with little padding."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.shapes import ROWS, rounded, series


@given(st.integers(1, 1_000_000), st.sampled_from([1, 2, 16]))
def test_padding_is_at_most_an_eighth_or_less_than_the_least_step(size, least):
    found = rounded(size, least)
    assert found % least == 0
    assert size <= found < size + max(least, size / 8 + 1)
    assert rounded(found, least) == found


def test_a_batch_has_two_rows_at_least_and_nothing_stays_nothing():
    assert (rounded(0, ROWS), rounded(1, ROWS)) == (0, 2)


@pytest.mark.parametrize(("least", "largest"), [(1, 100), (2, 576), (2, 1), (16, 5000)])
def test_the_series_is_all_that_sizes_become(least, largest):
    sizes = list(series(largest, least))
    assert sizes == sorted({rounded(size, least) for size in range(1, largest + 1)})
    assert len(sizes) <= 16 + 8 * largest.bit_length()

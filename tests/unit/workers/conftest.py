"""What tests of both loops start with."""

from __future__ import annotations

import pytest

from tests.unit.workers.pair import Pair, tiny_engine


@pytest.fixture(params=[True, False], ids=["prefix-cache", "no-cache"])
def pair(tmp_path, request):
    engines = [tiny_engine(tmp_path / "m", prefix_cache=request.param) for _ in range(2)]
    return Pair(*engines)

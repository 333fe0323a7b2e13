"""What tests of both loops start with."""

from __future__ import annotations

import pytest

from cluster.config import Switch
from tests.unit.workers.pair import Pair, tiny_engine

ENGINES = {
    "prefix-cache": ({}, {}),
    "no-cache": ({"prefix_cache": False}, {"prefix_cache": False}),
    "ahead": ({}, {"ahead": Switch.ALWAYS}),
}
"""What is peculiar about prefill's engine, and about decode's."""


@pytest.fixture(params=ENGINES)
def pair(tmp_path, request):
    return Pair(*(tiny_engine(tmp_path / "m", **settings) for settings in ENGINES[request.param]))

"""What tests of both loops start with."""

from __future__ import annotations

import pytest

from cluster.shards import Grid
from tests.unit.engine.thread_ranks import ThreadRanks
from tests.unit.workers.pair import ENGINES, STAGES, Pair, tiny_config, tiny_engine


@pytest.fixture(params=ENGINES)
def pair(tmp_path, request):
    if request.param != STAGES:
        yield Pair(*(tiny_engine(tmp_path / "m", **settings) for settings in ENGINES[request.param]))
        return
    sizes = {"pool_pages": 64, "max_running": 16, "chunk_tokens": 16, "grid": Grid(stages=2)}
    workers = {name: ThreadRanks(tiny_config(tmp_path / "m", **sizes)) for name in ("prefill", "decode")}
    yield Pair(*(ranks.engine for ranks in workers.values()), {name: ranks.caches for name, ranks in workers.items()})
    for ranks in workers.values():
        ranks.close()

"""A worker's engine on several ranks: they live and die together, and hand over to another number of ranks."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from cluster.config import Decode, Model, Topology
from cluster.engine_host import EngineHost
from cluster.errors import WorkerLost
from cluster.shards import Grid
from cluster.topology import dump_topology
from tests.process.engine_pair import expect_tokens_of_one, topology_of

STAND_INS = Path(__file__).parent / "stand_ins"
RANKS = 2
SOON = 150.0

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
async def host(tmp_path):
    """A toy engine of two ranks. The test ends it."""
    topology = tmp_path / "t.yaml"
    topology.write_text(dump_topology(Topology(model=Model(path="toy"), decode=Decode(tensor_parallel=RANKS))))
    arguments = ["--topology", str(topology), "--index", "0", "--name", "w", "--host", "127.0.0.1"]
    environment = {"PYTHONPATH": f"{STAND_INS}:{STAND_INS.parents[2]}", "CRASHES": str(tmp_path / "crashes")}
    return await EngineHost.start("toy_engine", arguments, environment, RANKS)


def processes_of(host: EngineHost) -> list[psutil.Process]:
    """In order of their ranks."""
    return [psutil.Process(rank.pid) for rank in host._ranks]


def all_dead(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


async def until_dead(host: EngineHost) -> None:
    while True:
        await host.receive()


async def test_all_ranks_end_when_they_are_asked_to(host):
    ready = await asyncio.wait_for(host.ready(), SOON)
    processes = processes_of(host)
    known = [ready.process.pid, *(rank.process.pid for rank in ready.followers)]
    assert known == [process.pid for process in processes]
    await host.close()
    assert all_dead(processes)
    assert [(await rank.end()).well for rank in host._ranks] == [True] * RANKS


@pytest.mark.parametrize("rank", range(RANKS))
async def test_the_death_of_one_rank_is_that_of_all(host, rank):
    await asyncio.wait_for(host.ready(), SOON)
    processes = processes_of(host)
    os.kill(processes[rank].pid, signal.SIGKILL)
    culprit = "the engine process" if rank == 0 else f"rank {rank} of the engine process"
    with pytest.raises(WorkerLost, match=f"{culprit} died .signal SIGKILL"):
        await asyncio.wait_for(until_dead(host), SOON)
    await host.close()
    assert all_dead(processes)


async def test_two_stages_hand_over_to_two_shards(tmp_path):
    """The longest prompt is four chunks, which follow each other through the stages."""
    await expect_tokens_of_one(topology_of(tmp_path / "model", "nixl", Grid(stages=2), Grid(shards=2)), tmp_path, SOON)

"""A worker's ranks on two hosts, both of which this machine plays: they live and die together, and nobody is called
dead who may be alive. The engine is a toy; `test_spread.py` has the real one."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import aiohttp
import psutil
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cluster.access.security import ClusterSecurity
from cluster.clock import MonotonicClock
from cluster.config import Model, Security, Topology
from cluster.engine_host import EngineHost
from cluster.engine_messages import EngineReady
from cluster.errors import ConfigError, WorkerLost
from cluster.rank_host import RankHost
from cluster.rank_hosts import RankHosts
from cluster.rank_process import engine_command
from cluster.topology import dump_topology
from tests.process.api import eventually

STAND_INS = Path(__file__).parent / "stand_ins"
NODES = 2
ADDRESS = "127.0.0.1"
SOON = 60.0
LOOK_SECONDS = 0.05

pytestmark = pytest.mark.timeout(200)


class Spread:
    """A worker's control process, as far as its ranks are concerned, and the rank host of its other node."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        topology = folder / "t.yaml"
        topology.write_text(dump_topology(Topology(model=Model(path="toy"))))
        self.crashes = folder / "crashes"
        self._arguments = ["--topology", str(topology), "--index", "0", "--name", "w", "--host", ADDRESS]
        self._environment = {"PYTHONPATH": f"{STAND_INS}:{STAND_INS.parents[2]}", "CRASHES": str(self.crashes)}
        self.asked_to_drain = asyncio.Event()
        self.hosts = RankHosts(NODES, self.asked_to_drain.set, MonotonicClock())
        self.hosts.listen_at(ADDRESS, ADDRESS)
        app = web.Application()
        app.router.add_get("/ranks", self.hosts.serve)
        self.refused: list[str] = []
        ClusterSecurity(self.security("the secret of this test")).guard(app, self.refused.append)
        self._server = TestServer(app)
        self._engines: list[EngineHost] = []

    async def __aenter__(self) -> Spread:
        await self._server.start_server()
        self.connect()
        return self

    def security(self, secret: str) -> Security:
        file = self._folder / secret.replace(" ", "-")
        file.write_text(secret)
        return Security(secret_file=str(file))

    async def __aexit__(self, *error: object) -> None:
        for engine in list(self._engines):
            await self.end(engine)
        await self.cut()
        await self.hosts.close()
        await self._server.close()

    def connect(self, node: int = 1, secret: str = "the secret of this test") -> RankHost:
        """The other node's rank host begins."""
        command = engine_command("toy_engine", self._arguments)
        url = str(self._server.make_url("")).rstrip("/")
        host = RankHost(url, node, command, self._environment, LOOK_SECONDS, MonotonicClock())
        self.away = asyncio.create_task(self._run(host, ClusterSecurity(self.security(secret)).session()))
        self.host = host
        return host

    @staticmethod
    async def _run(host: RankHost, session: aiohttp.ClientSession) -> None:
        async with session:
            await host.run(session)

    async def cut(self) -> None:
        """It is lost, and nobody hears its last words."""
        if self.host.linked:
            self.host._link._closed = True
        self.away.cancel()
        await asyncio.wait({self.away})

    async def start(self, ranks: int = NODES) -> EngineHost:
        arguments, environment = self._arguments, self._environment
        starting = EngineHost.start_spread("toy_engine", arguments, environment, ranks, self.hosts)
        engine = await asyncio.wait_for(starting, SOON)
        self._engines.append(engine)
        return engine

    async def end(self, engine: EngineHost) -> None:
        self._engines.remove(engine)
        await engine.close()

    async def up(self, ranks: int = NODES) -> tuple[EngineHost, EngineReady]:
        engine = await self.start(ranks)
        return engine, await asyncio.wait_for(engine.ready(), SOON)


@pytest.fixture
async def spread(tmp_path):
    async with Spread(tmp_path) as spread:
        yield spread


def processes(ready: EngineReady) -> list[psutil.Process]:
    """In order of their ranks."""
    return [psutil.Process(identity.pid) for identity in (ready.process, *(rank.process for rank in ready.followers))]


def all_dead(ranks: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ranks)


async def death(engine: EngineHost) -> str:
    async def wait() -> None:
        while True:
            await engine.receive()

    with pytest.raises(WorkerLost) as told:
        await asyncio.wait_for(wait(), SOON)
    return str(told.value)


async def test_all_ranks_come_up_and_end_when_they_are_asked_to(spread):
    engine, ready = await spread.up(ranks=4)
    ranks = processes(ready)
    assert len({process.pid for process in ranks}) == 4
    seen = engine.board.read().transfers

    async def moved() -> bool:
        return engine.board.read().transfers > seen + 1

    await eventually(moved, "the transfers of all ranks get on", SOON)
    await spread.end(engine)
    assert all_dead(ranks)


async def test_the_death_of_a_rank_elsewhere_is_that_of_all_and_others_follow(spread):
    engine, ready = await spread.up()
    ranks = processes(ready)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert await death(engine) == "rank 1 of the engine process died (signal SIGKILL)"
    await spread.end(engine)
    assert all_dead(ranks)
    _, again = await spread.up()
    assert again.epoch > ready.epoch


async def test_a_lost_host_ends_the_group_and_is_no_proof_of_death_before_it_is_back(spread):
    engine, ready = await spread.up()
    ranks = processes(ready)
    distant = ready.followers[-1].process
    await spread.cut()
    assert await death(engine) == "rank 1 of the engine process died (the rank host of node 1 was lost)"
    await spread.end(engine)
    assert all_dead(ranks)
    assert not spread.hosts.is_dead(distant), "nobody can know it here"
    spread.connect()

    async def witnessed() -> bool:
        return spread.hosts.is_dead(distant)

    await eventually(witnessed, "the host that is back testifies", SOON)
    alive = (await spread.up())[1].followers[-1].process
    assert not spread.hosts.is_dead(alive)


async def test_what_a_distant_rank_fails_with_is_what_the_worker_fails_with(spread):
    spread.crashes.write_text("rank 1")
    engine = await spread.start()
    with pytest.raises(ConfigError, match="told to crash"):
        await asyncio.wait_for(engine.ready(), SOON)


async def test_a_host_that_is_asked_to_end_has_the_worker_drain_first(spread):
    await spread.cut()
    host = spread.connect()
    _, ready = await spread.up()
    host.leave()
    await asyncio.wait_for(spread.asked_to_drain.wait(), SOON)
    assert not all_dead(processes(ready)) and not spread.away.done()
    await spread.hosts.close()
    await asyncio.wait_for(spread.away, SOON)


async def test_a_host_that_is_no_part_of_this_worker_is_refused(spread, caplog):
    await spread.cut()
    spread.connect(node=NODES)

    async def told() -> bool:
        return "refused a rank host" in caplog.text

    await eventually(told, "the worker says so", SOON)
    assert spread.hosts.missing == [1]


async def test_who_does_not_know_the_clusters_secret_runs_no_ranks(spread):
    await spread.cut()
    spread.connect(secret="the secret of another cluster")

    async def refused() -> bool:
        return "wrong_secret" in spread.refused

    await eventually(refused, "its proof is refused", SOON)
    assert spread.hosts.missing == [1] and not spread.host.linked

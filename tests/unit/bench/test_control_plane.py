"""Simulated workers among real ones' peers: bootstrap takes them for real, and misses them."""

import asyncio

import aiohttp
import msgspec
import pytest
from aiohttp import web

from bench.control_plane.measure import Losses, Measured, Placed, Recovered
from bench.control_plane.report import ControlPlaneReport
from bench.control_plane.worker import SimulatedWorker, answer
from bench.machine import describe_setting
from bench.report import markdown
from bench.statistics import Repeated
from bootstrap.server import BootstrapServer
from cluster.access.security import ClusterSecurity
from cluster.clock import MonotonicClock
from cluster.config import Bootstrap, Model, Security, Topology
from cluster.messages import AttemptFinished, DecodeAttempt, Fence, ModelCard, PrefillAttempt, Sampling, Tokens

CARD = ModelCard("m", 512, 100)
FENCE = Fence("r", 1, 2, 3)


@pytest.fixture
async def bootstrap(tmp_path, monkeypatch):
    """A bootstrap that demands a secret; its topology, a session of one who knows it."""
    monkeypatch.setenv("BATON_CLUSTER_SECRET", "a secret of this test alone")
    config = Bootstrap(heartbeat_seconds=0.05, lease_seconds=0.3)
    security = ClusterSecurity(Security())
    application = BootstrapServer(config, MonotonicClock()).application()
    security.guard(application, lambda reason: None)
    runner = web.AppRunner(application, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    topology = Topology(
        model=Model(path="none"), bootstrap=msgspec.structs.replace(config, port=runner.addresses[0][1])
    )
    async with security.session() as session:
        yield topology, session, security
    await runner.cleanup()


async def test_members_come_with_proof_and_go_by_the_lease(bootstrap):
    topology, session, security = bootstrap

    async def until(names):
        async def found():
            async with aiohttp.ClientSession() as stranger, stranger.get(f"{topology.bootstrap_url}/targets") as reply:
                return {target["labels"]["__meta_baton_worker"] for target in await reply.json()}

        async def look():
            while await found() != names:  # noqa: ASYNC110 - what is awaited is another process's word in earnest
                await asyncio.sleep(0.02)

        await asyncio.wait_for(look(), 20)

    workers = [SimulatedWorker(index, topology, session, security) for index in range(3)]
    for worker in workers:
        await worker.start(CARD)
    await until({"prefill-0", "decode-0", "prefill-1"})
    await workers[1].cut()
    await until({"prefill-0", "prefill-1"})
    workers[2].hush()
    await until({"prefill-0"})
    await workers[1].start(CARD)
    await until({"prefill-0", "decode-0"})
    assert workers[1].registered == 2
    for worker in workers:
        await worker.cut()


@pytest.mark.parametrize(
    ("attempt", "offsets"),
    [
        (PrefillAttempt(FENCE, [1, 2], Sampling(max_tokens=4, seed=0), decode="d"), [0]),
        (DecodeAttempt(FENCE, [1, 2], Sampling(max_tokens=4, seed=0), prefill="p"), [1, 2, 3]),
        (DecodeAttempt(FENCE, [1, 2], Sampling(max_tokens=4, seed=0), prefill=None, output=[5]), [1, 2, 3]),
    ],
)
def test_both_legs_together_give_each_token_once(attempt, offsets):
    words = answer(attempt)
    assert [emitted.offset for word in words if isinstance(word, Tokens) for emitted in word.tokens] == offsets
    assert isinstance(words[-1], AttemptFinished)


def test_the_largest_cluster_is_held_against_the_targets():
    def measured(workers, cpu):
        seconds = Losses(Repeated.over([2.5]), Repeated.over([0.002]))
        anew = Recovered(2.0, 0.5, 0.1)
        return Measured(
            workers, cpu, cpu, 0.1, 0.0, 2**26, 2**26, seconds, seconds, Placed(10, 0.003, 0.0004), anew, anew
        )

    report = ControlPlaneReport(describe_setting(), 1.0, 3.0, 20.0, [measured(50, 0.9), measured(500, 0.02)])
    lines = markdown(report.page, report.setting).splitlines()
    assert "| bootstrap, idle, percent of a core | 2.00 | ≤ 5.00 | met |" in lines
    assert "| 500 | 3.00 | 0.40 |" in lines

"""The same YAML on this machine and on two nodes of Ray: the same tokens, whatever is done to its pools and nodes."""

import asyncio
from collections.abc import Collection, Mapping, Sequence

import aiohttp
import pytest

from deploy.launchers.base import ProcessKind, Replica, ReplicaState
from tests.fault.answers import Answer
from tests.fault.crowd import Crowd, ask_in_peace
from tests.fault.questions import plan_questions
from tests.fault.story import tell
from tests.fault.watch import NO_OUTAGE
from tests.process.conftest import TOPOLOGIES
from tests.ray.cluster import PATIENCE, UpCluster, running
from tests.ray.nodes import SECOND_ADDRESS

SEED = 20_261_120
QUESTIONS = 18
STREAMS = 4
SETTINGS = ("model.dtype=float32", "kv.pool_tokens=8192")
ANSWERED = 12
"""Requests that a test waits for, so that it happens to some of them."""

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def questions(reference):
    return plan_questions(SEED, QUESTIONS, reference.named("raw-2000").prompt)


@pytest.fixture(scope="module")
def local_answers(questions, tmp_path_factory):
    """By question, from a cluster of this machine to which nothing happens."""

    async def ask() -> dict[str, Answer]:
        directory = tmp_path_factory.mktemp("peace") / "run"
        async with (
            running(TOPOLOGIES / "demo.yaml", SETTINGS, directory) as cluster,
            aiohttp.ClientSession() as session,
        ):
            return await ask_in_peace(session, cluster.url, questions, STREAMS)

    return asyncio.run(ask())


@pytest.fixture
def on_ray(ray_nodes):
    return (*SETTINGS, "launch=ray", f"ray.address={ray_nodes.address}")


async def test_pools_grow_to_four_and_shrink_to_one_under_load_and_nothing_is_lost(
    http, questions, local_answers, tmp_path
):
    async with running(TOPOLOGIES / "demo.yaml", SETTINGS, tmp_path / "run") as cluster:
        await grow_and_shrink(cluster, http, questions, local_answers)


async def test_on_ray_too_and_with_the_tokens_of_this_machine(http, questions, local_answers, on_ray, tmp_path):
    async with running(TOPOLOGIES / "demo.yaml", on_ray, tmp_path / "run") as cluster:
        assert await ask_in_peace(http, cluster.url, questions, STREAMS) == local_answers
        await grow_and_shrink(cluster, http, questions, local_answers)


async def test_pools_come_back_from_the_loss_of_a_node_under_load_and_no_request_is_lost(
    http, questions, local_answers, on_ray, ray_nodes, tmp_path
):
    async with running(TOPOLOGIES / "2p2d.yaml", on_ray, tmp_path / "run") as cluster:
        before = {each.name: each for each in await cluster.until_ready(6)}
        lost = {each.name for each in before.values() if SECOND_ADDRESS in each.node}
        assert {name.partition("-")[0] for name in lost} == {"prefill", "decode"}, "of each pool one is there"
        crowd = Crowd(http, cluster.url, questions, local_answers, NO_OUTAGE, SEED)
        async with crowd.of(STREAMS):
            await answered(crowd, ANSWERED)
            ray_nodes.kill_second()
            replicas = await cluster.until_all(lambda found: _came_back(found, before, lost))
            await answered(crowd, ANSWERED)
        assert not crowd.failures, tell(crowd.failures, {}, [], crowd.begun)
        assert not any(SECOND_ADDRESS in each.node for each in replicas)
    ray_nodes.start_second()


def _came_back(found: Sequence[Replica], before: Mapping[str, Replica], lost: Collection[str]) -> bool:
    """All can serve, and those of the lost node are others than before."""
    ready = {each.name: each for each in found if each.state is ReplicaState.READY}
    renewed = {name for name in ready if ready[name].instance != before[name].instance}
    return ready.keys() == before.keys() and renewed == lost


async def grow_and_shrink(cluster: UpCluster, http, questions, answers) -> None:
    crowd = Crowd(http, cluster.url, questions, answers, NO_OUTAGE, SEED)
    async with crowd.of(STREAMS):
        await answered(crowd, ANSWERED)
        await cluster.baton("scale", "decode=4")
        await cluster.until_ready(7)
        await answered(crowd, ANSWERED)
        await cluster.baton("scale", "decode=1", "prefill=2")
        await answered(crowd, ANSWERED)
    assert not crowd.failures, tell(crowd.failures, {}, [], crowd.begun)
    replicas = await cluster.until_ready(5)
    assert [each.name for each in replicas if each.kind is ProcessKind.DECODE] == ["decode-0"]


async def answered(crowd: Crowd, count: int) -> None:
    """Waits until so many further requests have been answered."""

    async def done(target: int) -> None:
        while len(crowd.judged) < target:  # noqa: ASYNC110 - a list that grows
            await asyncio.sleep(0.1)

    await asyncio.wait_for(done(len(crowd.judged) + count), PATIENCE)

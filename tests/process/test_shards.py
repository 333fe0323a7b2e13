"""The demo model on several ranks: the same tokens, whatever hands over to whatever, and whichever rank dies."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from bench.cluster import Cluster
from cluster.shards import Grid
from tests.process.api import Api, eventually
from tests.process.conftest import FLOAT32, TOPOLOGIES
from tests.process.processes import Processes
from tests.process.reader import Reader

LONGEST_SILENCE = 600.0
"""Seconds: several engine processes start anew meanwhile."""
SHARDED = [
    (Grid(prefill), Grid(decode)) for prefill in (1, 2, 3) for decode in (1, 2, 3) if (prefill, decode) != (1, 1)
]
"""Of three key/value heads, two shards have two and one; the pair (1, 1) is every other test's."""
STAGED = [
    (Grid(stages=2), Grid()),
    (Grid(), Grid(stages=2)),
    (Grid(stages=2), Grid(stages=3)),
    (Grid(shards=3, stages=2), Grid()),
    (Grid(shards=2), Grid(shards=2, stages=2)),
]
"""Of thirty layers, three stages have ten each."""
SHARDS, STAGES = (Grid(2), Grid(3)), (Grid(stages=2), Grid(stages=2))
"""Prefill and decode worker as some of them die."""
LAST = -1
LONGEST = 520
"""Tokens of a prompt: several chunks and many pages."""
CONCURRENT = 4
SAMPLED = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.95, "seed": 7, "ignore_eos": True}
LONG_ENOUGH = {"max_tokens": 160, "temperature": 0}
"""To be in the middle of when something dies."""

pytestmark = [pytest.mark.shards, pytest.mark.timeout(900)]


@pytest.fixture
async def http():
    timeout = aiohttp.ClientTimeout(total=None, sock_read=LONGEST_SILENCE)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield session


async def expect_reference_tokens(api, reference) -> None:
    turn = asyncio.Semaphore(CONCURRENT)

    async def answer(case):
        async with turn:
            return await api.stream(case.prompt, max_tokens=case.new_tokens, temperature=0)

    cases = [case for case in reference.cases if case.messages is None and len(case.prompt) <= LONGEST]
    answers = await asyncio.gather(*(answer(case) for case in cases))
    pairs = zip(cases, answers, strict=True)
    assert not {case.name: answer.tokens for case, answer in pairs if answer.tokens != case.expected}


def name_of(grid: Grid) -> str:
    return f"{grid.shards}x{grid.stages}"


def divided_into(prefill: Grid, decode: Grid) -> tuple[str, ...]:
    return tuple(
        f"{pool}.{key}={count}"
        for pool, grid in (("prefill", prefill), ("decode", decode))
        for key, count in (("tensor_parallel", grid.shards), ("pipeline_parallel", grid.stages))
    )


@pytest.mark.parametrize("grid", [Grid(2), Grid(3), Grid(stages=2), Grid(shards=2, stages=2)], ids=name_of)
async def test_ranks_together_give_the_tokens_of_one(grid, http, reference, tmp_path):
    settings = (*FLOAT32, *divided_into(Grid(), grid))
    with Cluster(TOPOLOGIES / "unified.yaml", settings, tmp_path) as cluster:
        await expect_reference_tokens(Api(http, cluster.url), reference)


@pytest.mark.parametrize("transfer", ["nixl", "mooncake"])
@pytest.mark.parametrize(("prefill", "decode"), SHARDED + STAGED, ids=name_of)
async def test_any_ranks_hand_over_to_any(prefill, decode, transfer, http, reference, tmp_path):
    settings = (*FLOAT32, *divided_into(prefill, decode), f"kv.transfer={transfer}")
    with Cluster(TOPOLOGIES / "demo.yaml", settings, tmp_path) as cluster:
        await expect_reference_tokens(Api(http, cluster.url), reference)


@pytest.fixture(scope="module", params=[SHARDS, STAGES], ids=["shards", "stages"])
def divided(request, tmp_path_factory):
    """Some ranks hand over to others; both sides may lose some, again and again."""
    settings = (*FLOAT32, *divided_into(*request.param), "restarts.most=20")
    processes = Processes(TOPOLOGIES / "demo.yaml", tmp_path_factory.mktemp("divided"), settings, 300.0)
    try:
        for name in ("bootstrap", "router", "prefill-0", "decode-0"):
            processes.start(name)
        processes.wait_workers("prefill-0", "decode-0")
        processes.wait_healthy()
        yield processes
    finally:
        processes.close()


@pytest.mark.parametrize(("worker", "rank"), [("decode-0", LAST), ("decode-0", 0), ("prefill-0", LAST)])
async def test_a_request_survives_the_death_of_a_rank_with_its_tokens(worker, rank, divided, http, reference):
    api, prompt = Api(http, divided.url), reference.named("raw-513").prompt
    greedy = (await api.stream(prompt, ignore_eos=True, **LONG_ENOUGH)).tokens
    sampled = (await api.stream(prompt, **SAMPLED)).tokens
    before = divided.epoch(worker)
    reader = Reader(api, prompt, **LONG_ENOUGH)
    await reader.decode_worker()
    divided.engines(worker)[rank].kill()
    await reader.task
    assert reader.tokens == greedy

    async def replaced():
        return (divided.epoch(worker) or 0) > before

    await eventually(replaced, f"{worker} is back with other engine processes", LONGEST_SILENCE)
    divided.wait_healthy()
    assert (await api.stream(prompt, **SAMPLED)).tokens == sampled

    async def idle():
        return divided.workers().idle

    await eventually(idle, "no page has an owner", 60.0)

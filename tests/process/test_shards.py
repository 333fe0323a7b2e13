"""The demo model on several ranks: the same tokens, whatever hands over to whatever, and whichever rank dies."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from bench.cluster import Cluster
from tests.process.api import Api, eventually
from tests.process.conftest import FLOAT32, TOPOLOGIES
from tests.process.processes import Processes
from tests.process.reader import Reader

LONGEST_SILENCE = 600.0
"""Seconds: several engine processes start anew meanwhile."""
PAIRS = [(prefill, decode) for prefill in (1, 2, 3) for decode in (1, 2, 3) if (prefill, decode) != (1, 1)]
"""Of three key/value heads, two ranks have two and one; the pair (1, 1) is every other test's."""
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


@pytest.mark.parametrize("ranks", [2, 3])
async def test_ranks_together_give_the_tokens_of_one(ranks, http, reference, tmp_path):
    settings = (*FLOAT32, f"decode.tensor_parallel={ranks}")
    with Cluster(TOPOLOGIES / "unified.yaml", settings, tmp_path) as cluster:
        await expect_reference_tokens(Api(http, cluster.url), reference)


@pytest.mark.parametrize("transfer", ["nixl", "mooncake"])
@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
async def test_any_ranks_hand_over_to_any(prefill, decode, transfer, http, reference, tmp_path):
    sizes = (f"prefill.tensor_parallel={prefill}", f"decode.tensor_parallel={decode}", f"kv.transfer={transfer}")
    with Cluster(TOPOLOGIES / "demo.yaml", (*FLOAT32, *sizes), tmp_path) as cluster:
        await expect_reference_tokens(Api(http, cluster.url), reference)


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """Two ranks hand over to three; both sides may lose some, again and again."""
    sizes = ("prefill.tensor_parallel=2", "decode.tensor_parallel=3", "restarts.most=20")
    processes = Processes(TOPOLOGIES / "demo.yaml", tmp_path_factory.mktemp("divided"), (*FLOAT32, *sizes), 300.0)
    try:
        for name in ("bootstrap", "router", "prefill-0", "decode-0"):
            processes.start(name)
        processes.wait_workers("prefill-0", "decode-0")
        processes.wait_healthy()
        yield processes
    finally:
        processes.close()


@pytest.mark.parametrize(("worker", "rank"), [("decode-0", 2), ("decode-0", 0), ("prefill-0", 1)])
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

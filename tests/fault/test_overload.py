"""Ten times more requests than the cluster can answer: those it takes are served as if the others were not there."""

from __future__ import annotations

import asyncio
import random
import time
from typing import NamedTuple

import pytest

from bench.cluster import Cluster
from bench.statistics import percentile
from tests.process.api import MODEL
from tests.process.conftest import TOPOLOGIES

AT_ONCE = 16
"""Choices that the router takes on."""
SETTINGS = (f"router.limits.choices={AT_ONCE}",)
OVERLOAD = 10
CALM_SECONDS, OVERLOAD_SECONDS = 20.0, 60.0
PROMPT_TOKENS, ANSWER_TOKENS = 64, 32
MOST_SLOWER = 2.0
REFUSAL_SECONDS = 0.05
MOST_GROWTH = 1.05
pytestmark = [pytest.mark.fault, pytest.mark.timeout(400)]


class Asked(NamedTuple):
    """One request, not streamed."""

    status: int
    seconds: float
    retry_after: str | None
    tokens: int


class Askers:
    """Asks with prompts that differ; keeps what came of it."""

    def __init__(self, session, url, corpus, seed):
        self.asked: list[Asked] = []
        self._session = session
        self._url = url
        self._corpus = corpus
        self._draw = random.Random(seed)

    async def ask(self):
        start = self._draw.randrange(len(self._corpus) - PROMPT_TOKENS)
        body = {
            "model": MODEL,
            "prompt": self._corpus[start : start + PROMPT_TOKENS],
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
        }
        begun = time.monotonic()
        async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
            answer = await response.json()
        seconds = time.monotonic() - begun
        tokens = answer["usage"]["completion_tokens"] if response.status == 200 else 0
        self.asked.append(Asked(response.status, seconds, response.headers.get("Retry-After"), tokens))

    async def ask_on(self, seconds):
        """One request after the other."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await self.ask()

    async def pour(self, rate, seconds):
        """`rate` requests a second, whatever becomes of them."""
        begun, tasks = time.monotonic(), []
        while (now := time.monotonic() - begun) < seconds:
            tasks += [asyncio.create_task(self.ask()) for _ in range(int(now * rate) - len(tasks))]
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*tasks)

    def of(self, status):
        return [each for each in self.asked if each.status == status]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(TOPOLOGIES / "demo.yaml", SETTINGS, tmp_path_factory.mktemp("overload")) as started:
        yield started


async def test_what_is_taken_on_under_tenfold_load_is_served_as_without(cluster, http, reference, fault_seed):
    corpus = reference.named("raw-2000").prompt
    calm = Askers(http, cluster.url, corpus, fault_seed)
    await asyncio.gather(*(calm.ask_on(CALM_SECONDS) for _ in range(AT_ONCE)))
    assert {each.status for each in calm.asked} == {200}
    rate = len(calm.asked) / CALM_SECONDS

    overrun = Askers(http, cluster.url, corpus, fault_seed + 1)
    await overrun.pour(OVERLOAD * rate, OVERLOAD_SECONDS / 6)
    before = cluster.tree.resident_bytes()
    await overrun.pour(OVERLOAD * rate, OVERLOAD_SECONDS)
    growth = {name: resident / before[name] for name, resident in cluster.tree.resident_bytes().items()}

    accepted, refused = overrun.of(200), overrun.of(429)
    slower = percentile([each.seconds for each in accepted], 99) / percentile([each.seconds for each in calm.asked], 99)
    refusal = percentile([each.seconds for each in refused], 99)
    print(f"{rate:.1f} requests/s in calm; of {len(overrun.asked)}, {len(accepted)} were answered, the others refused")
    print(f"p99: refused after {1000 * refusal:.1f} ms, answered {slower:.2f} times as late as in calm")
    print(f"memory: {max(growth.values()):.3f} times as much, at most")
    assert len(accepted) + len(refused) == len(overrun.asked), {each.status for each in overrun.asked}
    assert all(each.tokens == ANSWER_TOKENS for each in accepted)
    assert all(each.retry_after and int(each.retry_after) > 0 for each in refused)
    assert refusal < REFUSAL_SECONDS
    assert slower < MOST_SLOWER
    assert max(growth.values()) < MOST_GROWTH, growth
    cluster.wait_idle()

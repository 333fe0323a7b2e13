"""Retraction in a real cluster, at each third step of decode: no client can tell. And, by hand, all modes.

That a cluster with two pools gives the reference's tokens while it retracts is in test_same_tokens.py.
"""

import asyncio

import aiohttp
import pytest

from bench.cluster import Cluster
from tests.process.api import MODEL, Api
from tests.process.conftest import FLOAT32, TOPOLOGIES
from tests.process.test_same_tokens import LOGPROB_TOLERANCE, ask, largest_drift

TOPOLOGY_OF = {"1p1d": ("demo.yaml",), "unified": ("unified.yaml", "decode.cpus=[[1]]")}
FORCED = "decode.scheduling.retract_every_steps=3"
CASES = ("raw-1", "raw-16", "raw-33", "raw-64", "raw-128", "raw-300", "chat-3")
SAMPLED = {
    "max_tokens": 16, "temperature": 0.9, "top_p": 0.95, "seed": 11, "presence_penalty": 0.4, "frequency_penalty": 0.3,
    "ignore_eos": True,
}  # fmt: skip

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", params=["unified", pytest.param("1p1d", marks=pytest.mark.soak)])
def cluster(request, tmp_path_factory):
    topology, *settings = TOPOLOGY_OF[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with Cluster(TOPOLOGIES / topology, (*FLOAT32, *settings, FORCED), folder) as started:
        yield started


async def test_interrupted_answers_are_those_of_transformers(cluster, http, reference):
    api = Api(http, cluster.url)
    cases = [reference.named(name) for name in CASES]
    answers = await asyncio.gather(*(ask(api, case) for case in cases))
    assert [answer.tokens for answer in answers] == [case.expected for case in cases]
    assert [len(answer.logprobs) for answer in answers] == [len(case.expected) for case in cases]
    assert max(map(largest_drift, cases, answers)) <= LOGPROB_TOLERANCE
    cluster.wait_idle()


async def test_sampling_penalties_limits_and_usage_go_on_where_they_were(cluster, demo_cluster, http, reference):
    case = reference.named("raw-33")
    plain = await Api(http, demo_cluster.url).complete(case.prompt, **SAMPLED)
    body = {"model": MODEL, "prompt": case.prompt, "return_token_ids": True, **SAMPLED}
    async with http.post(f"{cluster.url}/v1/completions", json=body) as response:
        answer = await response.json()
    assert answer["choices"][0]["token_ids"] == plain.tokens
    assert answer["usage"]["completion_tokens"] == SAMPLED["max_tokens"]
    async with http.get(f"{cluster.url}/v1/requests/{answer['id']}") as response:
        record = await response.json()
    assert record["attempts"] >= 4, "retracted at each third step"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] <= len(case.prompt)
    stop = plain.tokens[9]
    stopped = await Api(http, cluster.url).complete(case.prompt, **SAMPLED, stop_token_ids=[stop])
    assert stopped.tokens == plain.tokens[: plain.tokens.index(stop) + 1]
    assert stopped.finish_reason == "stop"
    cluster.wait_idle()


# --- by hand: pytest tests/process/test_retraction.py -m soak (minutes) ----------------------------------------------

POOLS = ("prefill", "decode")
BY_HAND = {
    "cache off, chunks of 16": ("kv.prefix_cache=false", *(f"{pool}.chunk_tokens=16" for pool in POOLS)),
    "chunks of 2048": tuple(f"{pool}.chunk_tokens=2048" for pool in POOLS),
    **{
        policy: tuple(f"{pool}.scheduling.policy={policy}" for pool in POOLS)
        for policy in ("shortest_first", "longest_first", "longest_prefix", "priority")
    },
    "retraction": (FORCED,),
    "retraction, cache off": ("decode.scheduling.retract_every_steps=10", "kv.prefix_cache=false"),
    "retraction, a pool for few": (FORCED, "kv.pool_tokens=2560"),
    "conservative": ("decode.scheduling.conservativeness=1",),
    "half conservative, delayed": (
        "decode.scheduling.conservativeness=0.5", "decode.scheduling.prefill_delay_seconds=0.2",
    ),
}  # fmt: skip


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", BY_HAND)
@pytest.mark.parametrize("topology", TOPOLOGY_OF)
async def test_every_case_in_every_mode(topology, mode, reference, tmp_path):
    file, *settings = TOPOLOGY_OF[topology]
    patient = aiohttp.ClientTimeout(total=None)  # chunks of 16, or all to be computed again, take their time
    with Cluster(TOPOLOGIES / file, (*FLOAT32, *settings, *BY_HAND[mode]), tmp_path) as started:
        async with aiohttp.ClientSession(timeout=patient) as session:
            api, turn = Api(session, started.url), asyncio.Semaphore(8)

            async def tokens(case):
                async with turn:
                    return (await ask(api, case)).tokens

            answers = await asyncio.gather(*(tokens(case) for case in reference.cases))
        wrong = [case.name for case, answer in zip(reference.cases, answers, strict=True) if answer != case.expected]
        assert wrong == []
        started.wait_idle()

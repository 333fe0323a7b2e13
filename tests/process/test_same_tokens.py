"""The promise of the whole: splitting a model in two pools changes no token that it gives."""

import asyncio

import pytest

from bench.cluster import Cluster
from tests.process.api import Api
from tests.process.conftest import FLOAT32, TOPOLOGIES

TOPOLOGY_OF = {
    "1p1d-nixl": None,  # the session's own
    "1p1d-mooncake-ahead": ("demo.yaml", "kv.transfer=mooncake", "decode.scheduling.ahead=always"),
    "2p2d-mooncake-retracting": ("2p2d.yaml", "kv.transfer=mooncake", "decode.scheduling.retract_every_steps=5"),
    "unified": ("unified.yaml", "decode.cpus=[[1]]"),  # the clients need a core too
}
SOAKED = {"2p2d-nixl": ("2p2d.yaml",)}
"""With `make test-soak`: what it has in common with others is tested there."""
CONCURRENT = 8
LOGPROB_TOLERANCE = 1e-3
STILL_TRUE = ("raw-33", "raw-513", "chat-turns")
SEED = 20_261_101
SAMPLED = {"max_tokens": 24, "temperature": 0.9, "top_p": 0.95, "top_k": 200, "min_p": 0.01, "ignore_eos": True}

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module", params=[*TOPOLOGY_OF, *(pytest.param(name, marks=pytest.mark.soak) for name in SOAKED)])
def cluster(request, tmp_path_factory):
    wanted = (TOPOLOGY_OF | SOAKED)[request.param]
    if wanted is None:
        yield request.getfixturevalue("demo_cluster")
        return
    topology, *settings = wanted
    with Cluster(TOPOLOGIES / topology, (*FLOAT32, *settings), tmp_path_factory.mktemp(request.param)) as started:
        yield started


async def ask(api, case):
    """Raw prompts are streamed, chats are not: both ways an answer takes."""
    greedy = {"max_tokens": case.new_tokens, "temperature": 0}
    if case.messages is None:
        return await api.stream(case.prompt, logprobs=1, **greedy)
    messages = [{"role": message.role, "content": message.content} for message in case.messages]
    answer = await api.chat(messages, logprobs=True, **greedy)
    assert answer.prompt == case.prompt, f"{case.name}: the router's template or tokenizer differs"
    return answer


async def test_greedy_tokens_are_those_of_transformers(cluster, http, reference):
    """All 43 cases: 1 to 2,000 tokens, around page and chunk boundaries, chat and raw, with shared prefixes."""
    api, turn = Api(http, cluster.url), asyncio.Semaphore(CONCURRENT)

    async def answer(case):
        async with turn:
            return await ask(api, case)

    answers = await asyncio.gather(*(answer(case) for case in reference.cases))
    pairs = list(zip(reference.cases, answers, strict=True))
    wrong = {case.name: (answer.tokens, case.expected) for case, answer in pairs if answer.tokens != case.expected}
    assert not wrong
    off = {case.name: drift for case, answer in pairs if (drift := largest_drift(case, answer)) > LOGPROB_TOLERANCE}
    assert not off
    ends = {case.name: answer.finish_reason for case, answer in pairs}
    assert ends == {case.name: "length" if len(case.expected) == case.new_tokens else "stop" for case, _ in pairs}


def largest_drift(case, answer):
    return max(abs(ours - theirs) for ours, theirs in zip(answer.logprobs, case.logprobs, strict=True))


async def test_seeded_samples_are_the_same_anywhere_alone_and_in_a_batch(cluster, demo_cluster, http, reference):
    prompt = reference.named("raw-33").prompt
    alone = await Api(http, demo_cluster.url).complete(prompt, seed=SEED, **SAMPLED)
    assert (await Api(http, cluster.url).complete(prompt, seed=SEED, **SAMPLED)).tokens == alone.tokens
    crowd = [case.prompt for case in reference.cases if len(case.prompt) <= 300][:15]
    api = Api(http, cluster.url)
    together = await asyncio.gather(
        *(api.complete(other, seed=SEED + number, **SAMPLED) for number, other in enumerate(crowd, 1)),
        api.complete(prompt, seed=SEED, **SAMPLED),
    )
    assert together[-1].tokens == alone.tokens
    assert (await api.complete(prompt, seed=SEED + 99, **SAMPLED)).tokens != alone.tokens


@pytest.mark.parametrize("name", STILL_TRUE)
def test_the_reference_is_what_transformers_says_today(oracle, reference, name):
    case = reference.named(name)
    answer = oracle.answer(case.prompt, case.new_tokens)
    assert answer.tokens == case.expected
    assert answer.logprobs == pytest.approx(case.logprobs, abs=LOGPROB_TOLERANCE)
    if case.messages is not None:
        messages = [{"role": message.role, "content": message.content} for message in case.messages]
        assert oracle.encode_chat(messages) == case.prompt


def test_the_reference_covers_what_it_should(reference):
    raw = [len(case.prompt) for case in reference.cases if case.messages is None]
    assert len(reference.cases) >= 40 and min(raw) == 1 and max(raw) == 2000
    assert {15, 16, 17, 511, 512, 513} <= set(raw)
    assert sum(case.messages is not None for case in reference.cases) >= 6
    assert reference.smallest_gap == min(case.gap for case in reference.cases) > 1e-3

"""Many clients, and clients that go away: everyone is served, and nothing is left behind."""

import asyncio

import pytest

from tests.process.api import eventually

STREAMS = 64
END_OF_SEQUENCE = 2
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True)
def leaves_no_owner(demo_cluster):
    """After every test here, each ledger of each worker is at zero."""
    yield
    demo_cluster.wait_idle()


async def test_64_streams_of_mixed_lengths_all_finish(api, reference):
    corpus = reference.named("raw-2000").prompt

    def shape(number):
        return 600 if number % 16 == 0 else 1 + number * 37 % 150, 2 + number * 11 % 40

    async def read(number):
        prompt_tokens, output_tokens = shape(number)
        prompt = corpus[number : number + prompt_tokens]
        return await api.stream(prompt, max_tokens=output_tokens, temperature=0, ignore_eos=True)

    found = await asyncio.gather(*(read(number) for number in range(STREAMS)))
    assert [len(each.tokens) for each in found] == [shape(number)[1] for number in range(STREAMS)]
    assert {each.finish_reason for each in found} == {"length"}


async def test_a_crowd_gets_the_tokens_that_one_alone_gets(api, reference):
    """Batches put together and taken apart by chance must not show in anyone's answer."""
    cases = [case for case in reference.cases if case.messages is None and len(case.prompt) <= 128]
    crowd = [cases[number % len(cases)] for number in range(STREAMS)]
    found = await asyncio.gather(*(api.stream(case.prompt, max_tokens=8, temperature=0) for case in crowd))
    assert [each.tokens for each in found] == [case.expected[:8] for case in crowd]


async def test_a_first_token_may_be_the_last(api, reference):
    """Prefill ends the request and calls off the handoff: the router hears of it from both legs, in either order."""
    case = next(case for case in reference.cases if case.expected[-1] == END_OF_SEQUENCE)
    prompt = case.prompt + case.expected[:-1]
    found = await asyncio.gather(*(api.stream(prompt, max_tokens=8, temperature=0) for _ in range(24)))
    assert {(tuple(each.tokens), each.finish_reason) for each in found} == {((END_OF_SEQUENCE,), "stop")}
    one = await asyncio.gather(*(api.stream(prompt, max_tokens=1, ignore_eos=True) for _ in range(8)))
    assert {(len(each.tokens), each.finish_reason) for each in one} == {(1, "length")}


async def test_a_client_that_leaves_while_it_reads_ends_the_decode(api, reference):
    async with api.open_stream(reference.named("raw-100").prompt, max_tokens=4000, ignore_eos=True) as chunks:
        seen = [await anext_of(chunks) for _ in range(3)]
    assert len(seen) == 3
    await nothing_in_flight(api)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_before_its_first_token_ends_the_prefill(api, reference, stream):
    body = {"prompt": reference.named("raw-2000").prompt, "max_tokens": 4000, "stream": stream}
    waiting = asyncio.create_task(_post(api, body))

    async def arrived():
        return await api.metric("baton_requests_in_flight") == 1

    await eventually(arrived, "the request is in flight")
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await nothing_in_flight(api)


async def anext_of(chunks):
    return await chunks.__anext__()


async def nothing_in_flight(api):
    async def gone():
        return await api.metric("baton_requests_in_flight") == 0

    await eventually(gone, "the router has let go of the request", seconds=5)


async def _post(api, body):
    async with api.session.post(
        f"{api.url}/v1/completions", json={"model": "smollm2-135m-instruct"} | body
    ) as response:
        await response.read()

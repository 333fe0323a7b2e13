"""A request that decode retracts goes on as another attempt, and its client sees one answer."""

import asyncio
import json

import pytest

from cluster.messages import FinishReason, Role
from tests.process.fake_worker import Behaviour, FakeWorker
from tests.process.router_house import House, demo_text, pair


@pytest.fixture(scope="module")
def text():
    return demo_text()


@pytest.mark.parametrize("unified", [False, True], ids=["1p1d", "unified"])
@pytest.mark.parametrize("offset", [1, 2, 5, 7])
async def test_the_answer_is_whole_and_each_token_comes_once(text, unified, offset):
    gate = asyncio.Event()
    retracts = Behaviour(retracted_at=offset, gate=None if unified else gate)
    workers = [FakeWorker("decode-0", Role.DECODE, 21, retracts)] if unified else pair(None, retracts)
    async with House(text, workers, unified=unified) as house:
        *events, usage, _ = await house.events(
            once_begun=gate.set, max_tokens=8, return_token_ids=True, logprobs=1, stream_options={"include_usage": True}
        )
        choices = [json.loads(event)["choices"][0] for event in events]
        assert [token for choice in choices for token in choice["token_ids"]] == [1000 + number for number in range(8)]
        assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == 8
        assert choices[-1]["finish_reason"] == "length"
        assert json.loads(usage)["usage"]["completion_tokens"] == 8
        # With one token left, the prefill leg alone gives it.
        last = house.workers["prefill-0" if offset == 7 and not unified else "decode-0"].attempts[-1]
        assert (last.fence.attempt, last.output) == (2, [1000 + number for number in range(offset)])
        _, record = await house.get(f"/v1/requests/{json.loads(events[0])['id']}")
        assert record["attempts"] == 2 and record["queue_seconds"] >= 0
        await house.until_idle()


async def test_cached_tokens_are_what_the_request_itself_was_spared(text):
    async with House(text, pair(None, Behaviour(retracted_at=3))) as house:
        usage = (await house.complete(prompt=[5] * 10, max_tokens=8))["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 3, "not what its own first attempt had computed"


async def test_it_is_counted_and_goes_where_there_is_room(text):
    workers = [*pair(None, Behaviour(retracted_at=2)), FakeWorker("decode-1", Role.DECODE, 22)]
    async with House(text, workers, policy="round_robin") as house:
        await house.complete(max_tokens=8)
        assert [len(house.workers[f"decode-{number}"].attempts) for number in range(2)] == [1, 1]
        counted = house.server.metrics.resumptions.labels(reason=FinishReason.RETRACTED.value)
        assert counted._value.get() == 1


async def test_priority_reaches_both_legs_and_has_its_limits(text):
    async with House(text, pair()) as house:
        await house.complete(max_tokens=4, priority=-5)
        await house.chat(max_tokens=4)
        for worker in house.workers.values():
            assert [attempt.priority for attempt in worker.attempts] == [-5, 0]
        status, answer = await house.post("/v1/completions", prompt="hello", priority=101)
        assert (status, answer["error"]["param"]) == (400, "priority")
        _, document = await house.get("/openapi.json")
        field = document["components"]["schemas"]["CompletionRequest"]["properties"]["priority"]
        assert "more urgent" in json.dumps(field)

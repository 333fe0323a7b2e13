"""Workers die, stall and lie, and the router's client sees one answer: each token once, in order, and one end."""

import asyncio
import json

import msgspec
import pytest

from cluster.config import Recovery
from cluster.errors import ErrorInfo
from cluster.messages import AttemptFinished, Emitted, FinishReason, Load, Role, Tokens
from tests.process.fake_worker import Behaviour, FakeWorker
from tests.process.router_house import Bound, House, demo_text, pair

SOON = Recovery(first_delay_seconds=0.01, longest_delay_seconds=0.05)
TOKENS = [1000 + number for number in range(8)]


@pytest.fixture(scope="module")
def text():
    return demo_text()


def two_and_two(**behaviours: Behaviour) -> list[FakeWorker]:
    """2P2D; `p0=...`, `d1=...` say how one behaves."""
    return [
        FakeWorker(f"prefill-{number}", Role.PREFILL, 10 + number, behaviours.get(f"p{number}")) for number in range(2)
    ] + [FakeWorker(f"decode-{number}", Role.DECODE, 20 + number, behaviours.get(f"d{number}")) for number in range(2)]


def told(events: list[str]) -> list[dict]:
    """The chunks of a stream, without its last word."""
    return [json.loads(event) for event in events if event.startswith("{")]


def tokens_of(chunks: list[dict], index: int = 0) -> list[int]:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return [token for choice in choices for token in choice.get("token_ids", [])]


async def whole_stream(house: House, path: str = "/v1/completions", **body) -> list[dict]:
    """Asserts that a stream of 8 tokens comes to its proper end; returns its chunks."""
    body = {"max_tokens": 8, "return_token_ids": True, "stream_options": {"include_usage": True}, **body}
    events = await house.events(path, **body)
    assert events[-1] == "[DONE]", events[-1]
    chunks = told(events)
    assert tokens_of(chunks) == TOKENS
    finishes = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert finishes[-1] == "length" and not any(finishes[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    await house.until_idle()
    return chunks


async def record_of(house: House, chunks: list[dict]) -> dict:
    _, record = await house.get(f"/v1/requests/{chunks[0]['id']}")
    return record


async def metrics_of(house: House) -> str:
    async with house.session.get(f"{house.url}/metrics") as response:
        return await response.text()


FAULTS = {
    "dies": {"dies_at": 3},
    "fails": {"fails_at": 3},
    "drains": {"fails_at": 3, "error": ErrorInfo("Draining", "this worker is leaving")},
    "was restarted": {"fails_at": 3, "error": ErrorInfo("StaleFence", "this is another life")},
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_stream_outlives_its_decode_worker(text, fault, path):
    body = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in path else {}
    gate = asyncio.Event()
    behaviour = Behaviour(gate=gate, **FAULTS[fault])
    async with House(text, two_and_two(d0=behaviour, d1=behaviour), recovery=SOON) as house:
        chunks = await whole_stream(house, path, once_begun=gate.set, **body)
        record = await record_of(house, chunks)
        first, second = record["history"]
        assert (first["tokens"], second["tokens"]) == (3, 5)
        assert first["blame"] == first["decode_worker"] != second["decode_worker"], "elsewhere, where there is another"
        assert first["prefill_worker"] == second["prefill_worker"], "which has the prompt's KV"
        assert (
            first["end"]
            == {
                "dies": "worker_lost",
                "fails": "transfer_failed",
                "drains": "drained",
                "was restarted": "protocol_error",
            }[fault]
        )
        assert second["end"] == "length" and 0 <= first["placed_seconds"] <= first["ended_seconds"]
        assert f'baton_request_resumptions_total{{reason="{first["end"]}"}} 1.0' in await metrics_of(house)


@pytest.mark.parametrize("fault", [Behaviour(dies_at=0), Behaviour(fails_at=0)], ids=["dies", "fails"])
async def test_another_prefill_worker_takes_over_and_decode_stays(text, fault):
    workers = two_and_two(p0=fault, p1=fault)
    async with House(text, workers, recovery=SOON) as house:
        first, second = (await record_of(house, await whole_stream(house)))["history"]
        assert first["blame"] == first["prefill_worker"] != second["prefill_worker"]
        assert first["decode_worker"] == second["decode_worker"]


async def test_blame_counts_and_not_the_leg_that_tells(text):
    """Decode says that prefill's pages arrived damaged: another prefill worker, not another decode worker."""
    blames = Behaviour(fails_at=1, blame=Role.PREFILL)
    async with House(text, two_and_two(d0=blames, d1=blames), recovery=SOON) as house:
        first, second = (await record_of(house, await whole_stream(house)))["history"]
        assert first["prefill_worker"] != second["prefill_worker"]
        assert first["decode_worker"] == second["decode_worker"]


@pytest.mark.parametrize("unified", [False, True], ids=["1p1d", "unified"])
async def test_with_nobody_else_the_same_worker_is_tried_again(text, unified):
    dies = Behaviour(dies_at=4, faulty_attempts=1)
    workers = [FakeWorker("decode-0", Role.DECODE, 21, dies)] if unified else pair(None, dies)
    async with House(text, workers, unified=unified, recovery=SOON) as house:
        chunks = await whole_stream(house)
        assert (await record_of(house, chunks))["attempts"] == 2


async def test_a_whole_pool_may_be_away_for_a_while(text):
    """Its only worker dies, and is back in another life later: the request waits for that, and so does a new one."""
    gate = asyncio.Event()
    async with House(text, pair(None, Behaviour(gate=gate)), recovery=SOON) as house:
        asking = asyncio.create_task(whole_stream(house))
        await house.until(lambda: bool(house.workers["decode-0"].attempts))
        await house.workers["decode-0"].close()
        await house.until(lambda: "decode-0" not in house.live())
        new = asyncio.create_task(whole_stream(house))
        await house.until(lambda: house.server.dispatcher.in_flight == 2)
        await house.add(FakeWorker("decode-0", Role.DECODE, 99))
        first, second = (await record_of(house, await asking))["history"]
        assert (first["end"], second["end"]) == ("worker_lost", "length")
        assert (await record_of(house, await new))["attempts"] == 1


@pytest.mark.parametrize("absence_seconds", [0.0, 0.3])
async def test_a_new_request_waits_no_longer_for_a_pool_than_it_is_told_to(text, absence_seconds):
    recovery = msgspec.structs.replace(SOON, absence_seconds=absence_seconds)
    async with House(text, pair(), recovery=recovery) as house:
        await house.complete(max_tokens=2)
        await house.workers["decode-0"].close()
        await house.until(lambda: "decode-0" not in house.live())
        status, answer = await house.post("/v1/completions", prompt="hello")
        assert (status, answer["error"]["code"]) == (503, "NoWorker")
        await house.until_idle()
        await house.add(FakeWorker("decode-0", Role.DECODE, 99))
        await house.until(lambda: "decode-0" in house.live())
        await house.complete(max_tokens=2)


async def test_a_new_request_that_turns_out_too_long_for_the_pool_that_is_back_hears_so(text):
    async with House(text, pair(), recovery=SOON) as house:
        await house.complete(max_tokens=2)
        await house.workers["decode-0"].close()
        await house.until(lambda: "decode-0" not in house.live())
        asking = asyncio.create_task(house.post("/v1/completions", prompt="hello", max_tokens=200))
        await house.until(lambda: house.server.dispatcher.in_flight == 1)
        await house.add(FakeWorker("decode-0", Role.DECODE, 99, pool_pages=2))
        status, answer = await asking
        assert (status, answer["error"]["code"]) == (400, "PromptTooLong")
        await house.until_idle()


async def test_the_wait_for_a_worker_ends_with_the_requests_deadline(text):
    gate = asyncio.Event()
    workers = pair(None, Behaviour(gate=gate))
    async with House(text, workers, recovery=SOON, request_timeout_seconds=0.4) as house:
        asking = asyncio.create_task(house.events(max_tokens=8))
        await house.until(lambda: bool(house.workers["decode-0"].attempts))
        await house.workers["decode-0"].close()
        error = json.loads((await asking)[-1])["error"]
        assert error["code"] == "DeadlineExceeded"
        assert "1 attempt failed; the last word was NoWorker: no decode worker is live" in error["message"]
        await house.until_idle()


async def test_a_client_that_leaves_while_its_request_waits_leaves_nothing_behind(text):
    gate = asyncio.Event()
    async with House(text, pair(None, Behaviour(gate=gate)), recovery=SOON) as house:
        asking = asyncio.create_task(house.events(max_tokens=8))
        await house.until(lambda: bool(house.workers["decode-0"].attempts))
        await house.workers["decode-0"].close()
        await house.until(lambda: "decode-0" not in house.live())
        asking.cancel()
        await house.until_idle()


async def test_n_choices_a_stop_string_and_logprobs_are_right_across_recovery(text):
    dies = Behaviour(dies_at=2)
    body = {"prompt": "hello", "n": 3, "max_tokens": 8, "logprobs": 1, "return_token_ids": True}
    async with House(text, two_and_two()) as house:
        expected = await house.complete(**body)
        stop = expected["choices"][0]["text"][5:9]
        stopped = await house.complete(**body, stop=stop)
    async with House(text, two_and_two(d0=dies, d1=dies), recovery=SOON) as house:
        for parameters, wanted in (({"stop": stop}, stopped), ({}, expected)):
            found = await house.complete(**body, **parameters)
            assert found["choices"] == wanted["choices"]
            assert found["usage"]["completion_tokens"] == wanted["usage"]["completion_tokens"]
        assert "baton_request_resumptions_total" in await metrics_of(house)
        await house.until_idle()


# --- stalls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["silent", "says so"])
async def test_a_worker_that_stalls_loses_its_requests_and_works_again_when_it_wakes_up(text, how):
    gate = asyncio.Event()
    workers = two_and_two(d0=Behaviour(gate=gate), d1=Behaviour(gate=gate))
    async with House(text, workers, recovery=SOON, lease_seconds=0.4) as house:
        asking = asyncio.create_task(whole_stream(house))
        await house.until(lambda: any(house.workers[f"decode-{number}"].attempts for number in range(2)))
        stalled, other = sorted(workers[2:], key=lambda worker: len(worker.attempts), reverse=True)
        other.behaviour.gate = None
        if how == "silent":
            stalled.heartbeats = False
        else:
            stalled.load = Load(ready=False, stalled="its engine has made no progress for 3.0 s")
        chunks = await asking
        first, second = (await record_of(house, chunks))["history"]
        assert (first["end"], first["blame"]) == ("stalled", stalled.name)
        assert second["decode_worker"] == other.name
        await house.until(lambda: len(stalled.cancelled) == 1)
        assert stalled.name not in house.live()
        stalled.heartbeats, stalled.load = True, Load()
        gate.set()
        await house.until(lambda: stalled.name in house.live())


async def test_late_words_of_a_worker_that_was_given_up_are_refused_and_counted(text):
    """It wakes up, and says what it has to say before it hears of the cancel."""
    gate = asyncio.Event()
    workers = two_and_two(d0=Behaviour(gate=gate), d1=Behaviour(gate=gate))
    async with House(text, workers, recovery=SOON, lease_seconds=0.4) as house:
        asking = asyncio.create_task(whole_stream(house))
        await house.until(lambda: any(worker.attempts for worker in workers[2:]))
        stalled, other = sorted(workers[2:], key=lambda worker: len(worker.attempts), reverse=True)
        stalled.heartbeats = False
        await house.until(lambda: len(other.attempts) == 1)
        fence = stalled.attempts[0].fence
        stalled.tell(Tokens([Emitted(fence, 1, 555)]))
        stalled.tell(AttemptFinished(fence, Role.DECODE, FinishReason.STOP))
        late = house.server.metrics.stale.labels(kind="AttemptFinished")
        await house.until(lambda: late._value.get() == 1)
        gate.set()
        await asking


# --- breakers --------------------------------------------------------------------------------------------------------


async def test_a_worker_that_fails_again_and_again_is_left_alone_until_a_probe_goes_well(text):
    limits = Recovery(first_delay_seconds=0.01, longest_delay_seconds=0.05, breaker_failures=1, breaker_seconds=0.3)
    bad = Behaviour(fails_at=1)
    async with House(text, two_and_two(d0=bad), recovery=limits, policy="round_robin") as house:
        worker = house.workers["decode-0"]
        async with Bound():
            while not worker.attempts:
                await whole_stream(house)
        assert 'baton_breaker_trips_total{role="decode",worker="decode-0"} 1.0' in await metrics_of(house)
        assert (await house.get("/status"))[1]["shut_out"] == ["decode-0"]
        worker.behaviour = Behaviour()
        await asyncio.gather(*(house.complete(max_tokens=4) for _ in range(6)))
        assert len(worker.attempts) == 1, "it is shut: others do its work"
        async with Bound():
            while len(worker.attempts) == 1:
                await house.complete(max_tokens=4)
        await asyncio.gather(*(house.complete(max_tokens=4) for _ in range(8)))
        assert len(worker.attempts) > 3, "the probe went well"


async def test_a_request_that_every_worker_fails_ends_with_one_typed_error_that_tells_the_story(text):
    bad = Behaviour(fails_at=0, faulty_attempts=99)
    limits = Recovery(max_attempts_without_progress=4, first_delay_seconds=0.01)
    async with House(text, two_and_two(p0=bad, p1=bad), recovery=limits) as house:
        async with house.session.post(
            f"{house.url}/v1/completions", json={"model": "fake", "prompt": "hello", "max_tokens": 8}
        ) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (503, "AttemptsExhausted")
            assert error["message"] == "4 attempts failed; the last word was TransferFailed: a page arrived damaged"
        assert sum(len(house.workers[f"prefill-{number}"].attempts) for number in range(2)) == 4
        await house.until_idle()

"""What a client of the router sees when something breaks for good: one clear end, at once, and nothing left behind."""

import asyncio
import json

import aiohttp
import pytest

from cluster.config import Recovery
from cluster.errors import ErrorInfo
from cluster.layout import KVLayout
from cluster.messages import AttemptStarted, Emitted, Fence, Load, Role, Tokens
from tests.process.fake_worker import LAYOUT, Behaviour, FakeWorker
from tests.process.router_house import MODEL, Bound, House, demo_text, pair

BODY = {"model": MODEL, "prompt": "hello", "max_tokens": 8}
ONE_ATTEMPT = Recovery(max_attempts=1)


@pytest.fixture(scope="module")
def text():
    return demo_text()


def prefill(number: int = 0, behaviour: Behaviour | None = None, **member) -> FakeWorker:
    return FakeWorker(f"prefill-{number}", Role.PREFILL, 10 + number, behaviour, **member)


def decode(number: int = 0, behaviour: Behaviour | None = None, **member) -> FakeWorker:
    return FakeWorker(f"decode-{number}", Role.DECODE, 20 + number, behaviour, **member)


# --- no worker -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "missing"),
    [
        ([], "no prefill worker is live"),
        ([decode()], "no prefill worker is live"),
        ([prefill()], "no decode worker is live"),
        (
            [prefill(), decode(layout=KVLayout("fake", "float32", 32, 1, 1, 8))],
            "no live prefill worker can hand over to a live decode worker",
        ),
        ([prefill(), decode(transfer="mooncake")], "no live prefill worker can hand over to a live decode worker"),
    ],
)
async def test_without_a_pair_the_answer_is_503_and_says_what_is_missing(text, workers, missing):
    async with House(text, workers) as house:
        for path in ("/health", "/v1/completions"):
            method = "GET" if path == "/health" else "POST"
            async with house.session.request(method, house.url + path, json=BODY) as response:
                error = (await response.json())["error"]
                assert (response.status, response.headers["Retry-After"]) == (503, "1")
                assert (error["type"], error["code"]) == ("server_error", "NoWorker")
                assert missing in error["message"]


async def test_health_comes_with_the_second_leg(text):
    async with House(text, [prefill()]) as house:
        assert (await house.get("/health"))[0] == 503
        await house.add(decode())
        await house.until(lambda: "decode-0" in house.live())
        assert (await house.get("/health"))[0] == 200


async def test_requests_go_on_coming_to_a_router_whose_workers_are_away(text):
    async with House(text, [prefill()]) as house:
        assert [(await house.get(path))[0] for path in ("/health", "/ready", "/live")] == [503, 503, 200]
        second = decode()
        await house.add(second)
        await house.until(lambda: "decode-0" in house.live())
        assert (await house.get("/ready"))[0] == 200
        await second.leave()
        await house.until(lambda: "decode-0" not in house.live())
        assert [(await house.get(path))[0] for path in ("/health", "/ready", "/live")] == [503, 200, 200]


async def test_a_silent_or_unready_or_leaving_worker_gets_no_new_work(text):
    workers = [prefill(), decode(0), decode(1), decode(2), decode(3)]
    async with House(text, workers, lease_seconds=0.5) as house:
        house.workers["decode-1"].heartbeats = False
        house.workers["decode-2"].load = Load(ready=False)
        await house.workers["decode-3"].leave()
        await house.until(lambda: house.live() == {"prefill-0", "decode-0"})
        await house.complete(n=4, max_tokens=4)
        assert [len(house.workers[f"decode-{number}"].attempts) for number in range(4)] == [4, 0, 0, 0]


async def test_a_worker_that_refuses_is_tried_again(text):
    refusing = decode()
    refusing.refuses = ErrorInfo("Draining", "not yet")
    async with House(text, [prefill()]) as house:
        await house.add(refusing)
        refusing.refuses = None
        await house.until(lambda: "decode-0" in house.live())


async def test_bootstraps_death_disturbs_nobody(text):
    async with House(text, pair()) as house:
        await house.stop_bootstrap()
        answer = await house.complete(max_tokens=4)
        assert answer["usage"]["completion_tokens"] == 4


async def test_a_pool_that_is_too_small_is_said_with_numbers(text):
    async with House(text, [prefill(pool_pages=4), decode(pool_pages=4)]) as house:
        status, answer = await house.post("/v1/completions", prompt=[5] * 40, max_tokens=30)
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "PromptTooLong", "max_tokens")
        assert "40 tokens" in answer["error"]["message"] and "64" in answer["error"]["message"]
        answer = await house.complete(prompt=[5] * 40)
        assert answer["usage"]["completion_tokens"] == 24, "without a limit of its own it gets what is left"


# --- failures under way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_before_the_first_token_a_failure_is_an_http_error(text, role):
    broken = Behaviour(fails_at=0 if role == "prefill" else 1)
    gate = Behaviour(silent_from=0)
    workers = pair(broken, None) if role == "prefill" else pair(gate, broken)
    async with House(text, workers, recovery=ONE_ATTEMPT) as house:
        async with house.session.post(f"{house.url}/v1/completions", json={**BODY, "stream": True}) as response:
            assert response.status == 503 and response.headers["Retry-After"] == "1"
            error = (await response.json())["error"]
        assert error["code"] == "AttemptsExhausted"
        assert error["message"] == "1 attempt failed; the last word was TransferFailed: a page arrived damaged"
        await house.until_idle()
        other = house.workers["decode-0" if role == "prefill" else "prefill-0"]
        assert len(other.cancelled) == 1, "the first failure decides the pair"


async def test_after_the_first_token_a_failure_is_the_streams_last_event(text):
    gate = asyncio.Event()
    fails = Behaviour(gate=gate, fails_at=3, blame=Role.PREFILL)
    async with House(text, pair(None, fails), recovery=ONE_ATTEMPT) as house:
        *events, last = await house.events(once_begun=gate.set, max_tokens=8)
        assert [json.loads(event)["choices"][0]["finish_reason"] for event in events] == [None] * len(events)
        assert json.loads(last)["error"]["code"] == "AttemptsExhausted"
        await house.until_idle()
        name = json.loads(events[0])["id"]
        _, record = await house.get(f"/v1/requests/{name}")
        assert (record["finish_reason"], record["error"], record["blame"]) == ("error", "AttemptsExhausted", "prefill")
        assert record["output_tokens"] == 3


async def test_what_no_attempt_can_mend_ends_the_request_with_its_own_error(text):
    refuses = Behaviour(fails_at=0, error=ErrorInfo("PromptTooLong", "not here, and nowhere else"))
    async with House(text, pair(refuses, None)) as house:
        status, answer = await house.post("/v1/completions", **BODY)
        assert (status, answer["error"]["message"]) == (400, "not here, and nowhere else")
        await house.until_idle()
        assert len(house.workers["prefill-0"].attempts) == 1


async def test_a_prefill_workers_death_after_the_handoff_disturbs_nobody(text):
    gate = asyncio.Event()
    async with House(text, pair(None, Behaviour(gate=gate))) as house:
        asking = asyncio.create_task(house.events(max_tokens=4))
        await house.until(lambda: bool(house.workers["prefill-0"].attempts) and not house.workers["prefill-0"].running)
        await house.workers["prefill-0"].close()
        await house.until(lambda: "prefill-0" not in house.live())
        gate.set()
        assert (await asking)[-1] == "[DONE]"
        await house.until_idle()


async def test_one_failed_choice_ends_the_request_and_cancels_the_others(text):
    workers = [prefill(), decode(0, Behaviour(silent_from=2)), decode(1, Behaviour(fails_at=2))]
    async with House(text, workers, recovery=ONE_ATTEMPT) as house:
        status, _ = await house.post("/v1/completions", **BODY, n=2)
        assert status == 503
        await house.until_idle()
        assert len(workers[1].cancelled) == 1


async def test_a_deadline_ends_what_hangs(text):
    async with House(text, pair(None, Behaviour(silent_from=2)), request_timeout_seconds=0.2) as house:
        *_, last = await house.events(max_tokens=8)
        error = json.loads(last)["error"]
        assert error["code"] == "DeadlineExceeded" and "0.2 s" in error["message"]
        await house.until_idle()
        assert len(house.workers["decode-0"].cancelled) == 1


async def test_a_worker_of_a_new_epoch_takes_over_its_name(text):
    async with House(text, pair()) as house:
        await house.workers["decode-0"].close()
        await house.add(FakeWorker("decode-0", Role.DECODE, 99))
        await house.until(lambda: [status.epoch for status in house.server.fleet.statuses()] == [99, 11])
        await house.until(lambda: len(house.live()) == 2)
        await house.complete(max_tokens=4)
        assert house.workers["decode-0"].attempts[0].fence.decode_epoch == 99


async def test_words_about_unknown_attempts_are_counted_and_ignored(text):
    async with House(text, pair()) as house:
        stale = Fence("nobody-0", 1, 11, 21)
        house.workers["decode-0"].tell(Tokens([Emitted(stale, 0, 5)]))
        house.workers["decode-0"].tell(AttemptStarted(stale, Role.DECODE))
        await house.complete(max_tokens=4)
        async with house.session.get(f"{house.url}/metrics") as response:
            metrics = await response.text()
        assert 'baton_stale_messages_total{kind="Tokens"} 1.0' in metrics
        assert 'baton_stale_messages_total{kind="AttemptStarted"} 1.0' in metrics


async def test_a_defect_ends_the_router_instead_of_one_silent_link(text):
    class Defective:
        def receive(self, key, message):
            raise ZeroDivisionError("a defect")

        def worker_lost(self, key, reason): ...

        def worker_stalled(self, key, reason): ...

    async with House(text, pair()) as house:
        house.server.fleet.listen(Defective())
        house.workers["decode-0"].tell(AttemptStarted(Fence("r-0", 1, 11, 21), Role.DECODE))
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(house.running, 5)


# --- clients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_disconnect_cancels_both_legs(text, stream):
    silent = Behaviour(silent_from=0)
    async with House(text, pair(silent, Behaviour(silent_from=1))) as house:
        asking = asyncio.create_task(house.post("/v1/completions", **BODY, stream=stream))
        await house.until(lambda: all(worker.attempts for worker in house.workers.values()))
        asking.cancel()
        await house.until(lambda: all(len(worker.cancelled) == 1 for worker in house.workers.values()))
        await house.until_idle()


async def test_a_disconnect_in_the_middle_of_a_stream_cancels_decode(text):
    async with House(text, pair(None, Behaviour(silent_from=4))) as house:
        body = {**BODY, "stream": True}
        async with house.session.post(f"{house.url}/v1/completions", json=body) as response:
            await response.content.readline()
        await house.until(lambda: len(house.workers["decode-0"].cancelled) == 1)
        await house.until_idle()


async def test_a_slow_reader_stalls_nobody_and_still_gets_all(text):
    long = Behaviour(answer=[1000 + number % 500 for number in range(6000)])
    async with House(text, pair(long, long)) as house:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(house.url.rsplit(":", 1)[1]), limit=4096)
        body = json.dumps({**BODY, "max_tokens": 6000, "stream": True, "logprobs": 5}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await house.until(lambda: len(house.workers["decode-0"].attempts) == 1)
        await house.until(lambda: not house.workers["decode-0"].running)
        answer = await house.complete(max_tokens=16)
        assert answer["usage"]["completion_tokens"] == 16
        received = b""
        while b"[DONE]" not in received[-64:]:
            received += await reader.read(65536)
        assert received.count(b'"finish_reason":"length"') == 1
        writer.close()


async def test_a_draining_router_lets_a_stream_finish_and_refuses_what_is_new(text):
    gate = asyncio.Event()
    async with House(text, pair(None, Behaviour(gate=gate))) as house:
        asking = asyncio.create_task(house.events(max_tokens=4))
        await house.until(lambda: bool(house.workers["decode-0"].attempts))
        house.server.ask_drain()
        async with aiohttp.ClientSession() as newcomer:
            for method, path in (("GET", "/health"), ("POST", "/v1/completions")):
                async with newcomer.request(method, house.url + path, json=BODY) as response:
                    assert (response.status, response.headers["Retry-After"]) == (503, "1")
                    assert (await response.json())["error"]["code"] == "Draining"
        assert not house.running.done()
        gate.set()
        assert (await asking)[-1] == "[DONE]"
        async with Bound():
            await house.running


async def test_a_drain_does_not_wait_for_ever(text):
    async with House(text, pair(None, Behaviour(silent_from=1)), drain_seconds=0.05) as house:
        asking = asyncio.create_task(house.events(max_tokens=4))
        await house.until(lambda: bool(house.workers["decode-0"].attempts))
        house.server.ask_drain()
        async with Bound():
            await house.running
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


def test_layouts_of_these_tests_differ():
    assert KVLayout("fake", "float32", 32, 1, 1, 8).fingerprint != LAYOUT.fingerprint

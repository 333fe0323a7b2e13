"""More than the cluster can do: what is taken on is served as ever, the rest is told at once when to come again."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import aiohttp
import psutil
import pytest

from cluster.config import RouterLimits
from cluster.messages import Role
from tests.process.fake_worker import Behaviour, FakeWorker
from tests.process.router_house import MODEL, House, demo_text, pair

CHOICES = 8
WORK_SECONDS = 0.06


@pytest.fixture(scope="module")
def text():
    return demo_text()


class OneAtATime(FakeWorker):
    """A worker of a fixed speed: each attempt takes `WORK_SECONDS`, and the next one waits for it."""

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, **settings)
        self._turn = asyncio.Lock()

    async def _play(self, link, request, attempt) -> None:
        async with self._turn:
            await asyncio.sleep(WORK_SECONDS)
        await super()._play(link, request, attempt)


def slow_pair() -> list[FakeWorker]:
    return [OneAtATime("prefill-0", Role.PREFILL, 11), FakeWorker("decode-0", Role.DECODE, 21)]


def waiting_pair() -> list[FakeWorker]:
    """Nothing begins before their gate is open."""
    gate = asyncio.Event()
    return pair(Behaviour(gate=gate), Behaviour(gate=gate))


async def ask(
    house: House, headers: dict[str, str] | None = None, session: aiohttp.ClientSession | None = None, **body
) -> tuple[int, dict, float, str | None]:
    """Status, answer, seconds, Retry-After."""
    begun = time.perf_counter()
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 4, **body}
    async with (session or house.session).post(f"{house.url}/v1/completions", json=body, headers=headers) as response:
        answer = await response.json()
        return response.status, answer, time.perf_counter() - begun, response.headers.get("Retry-After")


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


async def clients(house: House, count: int, seconds: float) -> tuple[list[float], list[float]]:
    """So many clients that ask again and again, after a refusal when they are told to. Returns the seconds of what was
    served and of what was refused."""
    served: list[float] = []
    refused: list[float] = []
    end = time.perf_counter() + seconds

    async def one(session: aiohttp.ClientSession, late: float) -> None:
        await asyncio.sleep(late)  # all at the same moment would measure the clients, who share this core
        while time.perf_counter() < end:
            status, answer, took, retry = await ask(house, session=session)
            if status == 200:
                served.append(took)
            else:
                assert (status, answer["error"]["code"]) == (429, "Overloaded"), answer
                assert retry is not None and int(retry) >= 1
                refused.append(took)
                await asyncio.sleep(int(retry) + late)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session, number / count) for number in range(count)))
    return served, refused


async def test_at_ten_times_the_load_what_is_accepted_is_served_as_before_and_the_rest_is_told_at_once(text):
    async with House(text, slow_pair(), limits=RouterLimits(choices=CHOICES)) as house:
        calm, none = await clients(house, CHOICES, 2.0)
        assert not none
        before = psutil.Process().memory_info().rss
        served, refused = await clients(house, 10 * CHOICES, 2.5)
        assert percentile(served, 0.99) < 2 * percentile(calm, 0.99)
        assert len(served) > 0.7 * len(calm) / 2.0 * 2.5, "refusing must not cost what serving needs"
        assert percentile(refused, 0.5) < 0.05, "clients, workers and router share this process and core"
        assert psutil.Process().memory_info().rss - before < 64 * 1024 * 1024
        await house.until_idle()


async def test_waiting_tokens_are_bounded_before_anything_is_tokenized(text):
    async with House(text, waiting_pair(), limits=RouterLimits(queued_tokens=1000)) as house:
        first = asyncio.create_task(ask(house, prompt=[5] * 900))
        await house.until(lambda: len(house.workers["prefill-0"].attempts) == 1)
        status, answer, _, _ = await ask(house, prompt="word " * 1000)
        assert status == 429 and "900 prompt tokens wait; the limit is 1000" in answer["error"]["message"]
        assert await metric(house, 'baton_admission_refusals_total{reason="queued_tokens"}') == 1
        assert await metric(house, "baton_queued_prompt_tokens") == 900
        assert await metric(house, "baton_tokenize_seconds_count") == 1, "of the first alone"
        house.workers["prefill-0"].behaviour.gate.set()
        assert (await first)[0] == 200
        await house.until_idle()
        assert await metric(house, "baton_queued_prompt_tokens") == 0
        assert await metric(house, "baton_choices_in_flight") == 0


async def test_a_more_urgent_request_takes_the_place_of_the_least_urgent_that_has_not_begun(text):
    async with House(text, waiting_pair(), limits=RouterLimits(choices=2)) as house:
        prefill = house.workers["prefill-0"]
        asking = {}
        for number, priority in enumerate((0, -5), 1):
            asking[priority] = asyncio.create_task(ask(house, priority=priority))
            await house.until(lambda wanted=number: len(prefill.attempts) == wanted)
        assert (await ask(house, priority=-5))[0] == 429, "an equal does not make way"
        urgent = asyncio.create_task(ask(house, priority=7))
        status, answer, _, retry = await asking[-5]
        assert (status, answer["error"]["code"], retry) == (429, "Overloaded", "1")
        assert "higher priority" in answer["error"]["message"]
        await house.until(lambda: len(prefill.cancelled) == 1)
        prefill.behaviour.gate.set()
        assert [(await each)[0] for each in (asking[0], urgent)] == [200, 200]
        await house.until_idle()


async def test_what_has_begun_keeps_its_place(text):
    behaviour = Behaviour(gate=asyncio.Event())
    async with House(text, pair(None, behaviour), limits=RouterLimits(choices=1)) as house:
        streaming = asyncio.create_task(house.events(max_tokens=4, priority=-100))
        await house.until(lambda: bool(house.workers["decode-0"].attempts))
        await house.until(lambda: not house.workers["prefill-0"].running)
        assert (await ask(house, priority=100))[0] == 429
        behaviour.gate.set()
        assert (await streaming)[-1] == "[DONE]"


async def test_a_request_that_would_be_late_is_refused_at_once_and_one_that_is_late_ends(text):
    async with House(text, waiting_pair()) as house:
        prefill = house.workers["prefill-0"]
        late = {"X-Request-Timeout": "0.4"}
        status, answer, _, _ = await ask(house, headers=late)
        assert (status, answer["error"]["code"]) == (503, "DeadlineExceeded") and "0.4 s" in answer["error"]["message"]
        prefill.behaviour.gate.set()
        for _ in range(3):  # the queue moves: about as fast as the first one had to wait
            assert (await ask(house, prompt=[5] * 10))[0] == 200
        prefill.behaviour.gate.clear()
        waiting = asyncio.create_task(ask(house, prompt=[5] * 8000, max_tokens=2))
        await house.until(lambda: any(len(attempt.prompt) == 8000 for attempt in prefill.attempts))
        status, answer, seconds, retry = await ask(house, headers={"X-Request-Timeout": "1"})
        assert (status, seconds < 0.5, int(retry) > 1) == (429, True, True), answer
        assert (await ask(house, headers={"X-Request-Timeout": "soon"}))[0] == 400
        prefill.behaviour.gate.set()
        assert (await waiting)[0] == 200
        await house.until_idle()


# --- clients that hold on to things ----------------------------------------------------------------------------------


async def test_a_prompt_that_can_not_fit_is_refused_without_being_tokenized(text):
    async with House(text, pair(), limits=RouterLimits(prompt_tokens=100)) as house:
        status, answer, _, _ = await ask(house, prompt="x" * 1_000_000)
        assert (status, answer["error"]["code"]) == (400, "PromptTooLong")
        assert "at least" in answer["error"]["message"]
        assert await metric(house, "baton_tokenize_seconds_count") == 0
        status, answer, _, _ = await ask(house, prompt=[5] * 101)
        assert status == 400 and "this router takes 100" in answer["error"]["message"]


async def test_tokenizing_a_long_prompt_holds_up_nobody(text):
    async with House(text, pair()) as house:
        longest = 0.0

        async def watch() -> None:
            nonlocal longest
            while True:
                before = time.perf_counter()
                await asyncio.sleep(0.001)
                longest = max(longest, time.perf_counter() - before)

        watching = asyncio.create_task(watch())
        status, _, seconds, _ = await ask(house, prompt="hello world " * 50_000)
        watching.cancel()
        assert status == 400, "it is too long by far; only its tokens could tell"
        assert longest < seconds / 2


async def test_a_client_that_takes_nothing_is_cut_off_and_its_request_cancelled(text):
    many = Behaviour(answer=[1000 + number % 500 for number in range(2000)])
    async with House(text, pair(many, many), limits=RouterLimits(stuck_seconds=0.3)) as house:
        before = house.server.connections
        # With buffers of the usual size, the kernel would take all of it in the client's place.
        for listening in house.server._server._listener.sockets:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(address(house))
            client.sendall(raw_request(stream=True, max_tokens=2000, logprobs=5))
            await house.until(lambda: len(house.workers["decode-0"].attempts) == 1)
            await house.until(lambda: house.server.connections == before)
        await house.until_idle()
        assert await metric(house, "baton_choices_in_flight") == 0
        assert await metric(house, 'baton_requests_total{outcome="cancelled",route="completions"}') == 1


async def test_a_body_that_does_not_come_is_not_waited_for(text):
    async with House(text, pair(), limits=RouterLimits(body_seconds=0.2)) as house:
        reader, writer = await asyncio.open_connection(*address(house))
        writer.write(raw_request()[:-5])
        assert (await asyncio.wait_for(reader.readline(), 5)).split()[1] == b"408"
        writer.close()
        await writer.wait_closed()


async def test_connections_are_bounded_and_idle_ones_closed(text):
    async with House(text, pair(), limits=RouterLimits(connections=3, idle_seconds=0.5)) as house:
        held = [await asyncio.open_connection(*address(house)) for _ in range(3)]
        for _, writer in held:
            writer.write(b"GET /health HTTP/1.1\r\nX-Slow: ")
        await house.until(lambda: house.server.connections == 3)
        reader, writer = await asyncio.open_connection(*address(house))
        writer.write(b"GET /health HTTP/1.1\r\n\r\n")
        refusal = await asyncio.wait_for(reader.read(), 5)
        assert b" 429 " in refusal and b"Retry-After: 1" in refusal and b"too many connections" in refusal
        for reader, _ in held:
            await asyncio.wait_for(reader.read(), 5)
        assert (await house.get("/health"))[0] == 200
        for _, each in [*held, (reader, writer)]:
            each.close()
            await each.wait_closed()


async def test_a_head_that_is_too_large_is_refused(text):
    async with House(text, pair(), limits=RouterLimits(header_bytes=1024)) as house:
        async with house.session.get(f"{house.url}/health", headers={"X-Much": "x" * 2000}) as response:
            assert response.status == 400
        assert (await house.get("/health"))[0] == 200


def raw_request(**body) -> bytes:
    content = json.dumps({"model": MODEL, "prompt": "hello", **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    return head.encode() + b"\r\n\r\n" + content


def address(house: House) -> tuple[str, int]:
    host, port = house.url.removeprefix("http://").split(":")
    return host, int(port)


async def metric(house: House, name: str) -> float:
    async with house.session.get(f"{house.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return float(next((line for line in lines if line.startswith(f"{name} ")), f"{name} 0").rsplit(" ", 1)[1])

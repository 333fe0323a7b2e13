"""The load generator against a small server that streams as OpenAI does."""

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.client import CompletionClient, Timeline
from bench.load import LONG, SHORT, LoadGenerator
from bench.measure import measure
from bench.workload import Arrivals, Prompts, Steady, Workload

TOKEN_SECONDS = 0.001
BRIEF = Workload(
    name="brief",
    steady=Steady(streams=3, prompt_tokens=4, output_tokens=6),
    long=Arrivals(period_seconds=0.05, prompt_tokens=40, output_tokens=2),
    warm_up_seconds=0.05,
    seconds=0.3,
)


class FakeEndpoint:
    """Streams as many tokens as are asked for, one a chunk; or answers what it is told to."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.status = 200
        self.breaks_off = False
        self.held_back = 0
        """Tokens that are told of in the usage only."""

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "no worker"}}, status=self.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        sent = body["max_tokens"] - self.held_back
        for index in range(sent):
            await asyncio.sleep(TOKEN_SECONDS)
            last = index == sent - 1
            choice = {"index": 0, "text": "a", "token_ids": [index], "finish_reason": "length" if last else None}
            await response.write(b"data: " + json.dumps({"id": "cmpl-1", "choices": [choice]}).encode() + b"\n\n")
        details = {"cached_tokens": 1}
        usage = {"prompt_tokens": 2, "completion_tokens": body["max_tokens"], "prompt_tokens_details": details}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n")
        if not self.breaks_off:
            await response.write(b"data: [DONE]\n\n")
        return response


@pytest.fixture
def endpoint():
    return FakeEndpoint()


@pytest.fixture
async def url(endpoint):
    app = web.Application()
    app.router.add_post("/v1/completions", endpoint.complete)
    async with TestServer(app) as server:
        yield str(server.make_url("/"))


@pytest.fixture
async def session():
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def client(session, url):
    return CompletionClient(session, url, "tiny", {"ignore_eos": True})


async def ask(client, tokens=3):
    timeline = Timeline(stream=SHORT, prompt_tokens=2, sent_at=0.0)
    await client.stream(timeline, [400, 401], tokens)
    return timeline


async def test_a_timeline_has_each_token_and_its_time(client, endpoint):
    timeline = await ask(client)
    assert timeline.tokens == 3 and timeline.finish_reason == "length" and timeline.error is None
    assert timeline.id == "cmpl-1"
    assert timeline.sent_at < timeline.arrivals[0] < timeline.arrivals[-1] <= timeline.ended_at
    assert endpoint.bodies[0] == {
        "model": "tiny", "prompt": [400, 401], "max_tokens": 3, "stream": True, "ignore_eos": True,
    }  # fmt: skip


async def test_an_error_is_a_result(client, endpoint):
    endpoint.status = 503
    assert (await ask(client)).error == 'HTTP 503: {"error": {"message": "no worker"}}'


async def test_a_stream_that_breaks_off_is_an_error(client, endpoint):
    endpoint.breaks_off = True
    assert "without [DONE]" in (await ask(client)).error


async def test_the_usage_has_the_tokens_that_came_in_no_chunk(client, endpoint):
    endpoint.held_back = 2
    timeline = await ask(client, tokens=5)
    assert timeline.counts == [1, 1, 3] and timeline.usage.prompt_tokens == 2 and timeline.usage.cached_tokens == 1


async def test_a_lenient_client_writes_text_and_does_without_done(session, url, endpoint):
    endpoint.breaks_off = True
    lenient = CompletionClient(session, url, "tiny", {}, as_text=lambda ids: " ".join(map(str, ids)), says_done=False)
    assert (await ask(lenient)).error is None
    assert endpoint.bodies[0]["prompt"] == "400 401"


async def test_only_the_window_counts_and_late_long_answers_are_waited_for(client):
    edges = []
    observed = await LoadGenerator(BRIEF, client, Prompts(0, 1000)).run(edges.append)
    assert edges == ["start", "end"]
    assert len(observed.timelines) > len(observed.sent(SHORT)) + len(observed.sent(LONG))
    assert all(line.ended_at is not None and line.tokens == 2 for line in observed.sent(LONG))
    found = measure(observed, [], {"router": 0.3})
    assert found.errors == []
    assert found.figures["ttft_short_p50"] >= TOKEN_SECONDS * 1e3
    assert found.figures["inter_token_p50"] >= TOKEN_SECONDS * 1e3
    tokens = found.figures["output_tokens_per_second"] * observed.seconds
    assert found.cpu_per_thousand_tokens["router"] == pytest.approx(0.3 / tokens * 1e3)


async def test_a_dead_endpoint_is_not_hammered(client, endpoint):
    endpoint.status = 503
    observed = await LoadGenerator(BRIEF, client, Prompts(0, 1000)).run()
    # Three streams with a pause of 0.1 s after each error ask a dozen times in 0.35 s; without one, hundreds of times.
    assert len(observed.timelines) < 60
    assert len(observed.errors) == len(observed.timelines)
    assert "output_tokens_per_second" in measure(observed, [], {}).figures

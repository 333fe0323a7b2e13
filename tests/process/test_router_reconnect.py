"""A client that lost its connection comes back, here or to another router, and gets the rest of the same stream."""

import asyncio
import json
from typing import NamedTuple

import pytest

from cluster.messages import Role
from tests.process.fake_worker import Behaviour, FakeWorker
from tests.process.router_house import MODEL, House, demo_text, pair

CHAT = {"messages": [{"role": "user", "content": "hello"}]}
NAME = "client-7"


@pytest.fixture(scope="module")
def text():
    return demo_text()


class Event(NamedTuple):
    id: str | None
    data: str

    @property
    def chunk(self) -> dict:
        return json.loads(self.data)


def parsed(stream: str) -> list[Event]:
    """By the rules of server-sent events; comments are left out."""
    events = []
    for block in stream.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            events.append(Event(fields.get("id"), fields["data"]))
    return events


async def stream(house: House, path: str, body: dict, last: str | None = None, name: str | None = NAME) -> list[Event]:
    async with opened(house, path, body, last, name) as response:
        text = (await response.read()).decode()
        assert response.status == 200, text
        return parsed(text)


def opened(house: House, path: str, body: dict, last: str | None = None, name: str | None = NAME):
    headers = {"X-Request-Id": name} if name is not None else {}
    headers |= {"Last-Event-ID": last} if last is not None else {}
    body = {"model": MODEL, "stream": True, "max_tokens": 8, "return_token_ids": True, **body}
    return house.session.post(house.url + path, json=body, headers=headers)


def put_together(events: list[Event]) -> tuple:
    """All that a client has got, however it was cut into events: by choice, and the usage."""
    choices: dict[int, dict[str, list]] = {}
    usage = None
    for event in events[: -1 if events[-1].data == "[DONE]" else None]:
        usage = event.chunk.get("usage") or usage
        for choice in event.chunk["choices"]:
            found = choices.setdefault(choice["index"], {"text": [], "tokens": [], "logprobs": [], "ends": []})
            found["text"].append(choice["delta"].get("content", "") if "delta" in choice else choice["text"])
            found["tokens"] += choice.get("token_ids", [])
            found["ends"].append(choice["finish_reason"])
            if "delta" in choice and "role" in choice["delta"]:
                found["ends"].append("opening")
            logprobs = choice["logprobs"] or {}
            found["logprobs"] += logprobs.get("content") or list(
                zip(logprobs.get("tokens", []), logprobs.get("text_offset", []), strict=True)
            )
    for found in choices.values():
        found["text"] = "".join(found["text"])
        found["ends"] = [end for end in found["ends"] if end]
    counts = usage and (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
    return choices, counts, events[-1].data == "[DONE]"


SHAPES = {
    "completion": ("/v1/completions", {"prompt": "hello", "logprobs": 2}),
    "chat": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1}),
    "three choices": ("/v1/completions", {"prompt": "hello", "n": 3}),
    "two prompts": ("/v1/completions", {"prompt": ["hello", "bye"]}),
    "chat, two choices, usage": ("/v1/chat/completions", {**CHAT, "n": 2, "stream_options": {"include_usage": True}}),
    "a stop string": (
        "/v1/completions",
        {"prompt": "hello", "stop": "STOP", "stream_options": {"include_usage": True}},
    ),
    "a stop token": ("/v1/completions", {"prompt": "hello", "stop_token_ids": [1003]}),
    "one token": ("/v1/chat/completions", {**CHAT, "max_tokens": 1}),
}


@pytest.mark.parametrize("shape", SHAPES)
async def test_from_each_event_on_the_rest_is_the_same(text, shape):
    path, body = SHAPES[shape]
    async with House(text, pair()) as house:
        if "stop" in body:
            whole = (await house.complete(max_tokens=8))["choices"][0]["text"]
            body = {**body, "stop": whole[8:14]}
        events = await stream(house, path, body)
        expected = put_together(events)
        *told, done = events
        assert done == Event(None, "[DONE]")
        assert len({event.id for event in told}) == len(told), "each event has an id of its own"
        for number, event in enumerate(told):
            rest = await stream(house, path, body, last=event.id)
            assert put_together([*told[: number + 1], *rest]) == expected
            assert rest[-1].data == "[DONE]"
        await house.until_idle()


async def test_a_client_that_comes_back_waits_for_what_it_has_not_got_only(text):
    """This router still has the ledger: it goes on from the client's place, instead of from the beginning."""
    silent = Behaviour(silent_from=5)
    async with House(text, pair(None, silent)) as house:
        body = {"prompt": "hello", "logprobs": 1}
        first: list[Event] = []
        async with opened(house, "/v1/completions", body) as response:
            while not first or first[-1].id != "5":
                first += parsed((await response.content.readuntil(b"\n\n")).decode())
        await house.until_idle()
        house.workers["decode-0"].behaviour = Behaviour()
        rest = await stream(house, "/v1/completions", body, last="5")
        choices, _, done = put_together([*first, *rest])
        assert choices[0]["tokens"] == [1000 + number for number in range(8)]
        assert len(choices[0]["logprobs"]) == 8 and done
        assert [len(attempt.output) for attempt in house.workers["prefill-0"].attempts] == [0, 4]
        other = await stream(house, "/v1/completions", {**body, "prompt": "another"}, last="5")
        assert put_together(other)[0][0]["tokens"] == [1005, 1006, 1007]
        assert house.workers["prefill-0"].attempts[-1].output == [], "of another request it knows nothing"


async def test_a_connection_that_died_unnoticed_ends_when_its_client_comes_back(text):
    async with House(text, pair(None, Behaviour(silent_from=3))) as house:
        async with opened(house, "/v1/completions", {"prompt": "hello"}) as response:
            assert (await response.content.readline()).startswith(b"id: ")
            await house.until(lambda: len(house.workers["decode-0"].attempts) == 1)
            house.workers["decode-0"].behaviour = Behaviour()
            rest = await asyncio.wait_for(stream(house, "/v1/completions", {"prompt": "hello"}, last="1"), 5)
        assert put_together(rest)[0][0]["tokens"] == [1000 + number for number in range(1, 8)]
        await house.until(lambda: len(house.workers["decode-0"].cancelled) == 1)
        await house.until_idle()


async def test_what_a_name_gives_is_the_same_from_any_router_and_another_name_gives_another(text):
    async def seeds(name: str | None, **body) -> list[int]:
        async with House(text, pair()) as house:
            await stream(house, "/v1/completions", {"prompt": "hello", "n": 2, **body}, name=name)
            return sorted(attempt.sampling.seed for attempt in house.workers["prefill-0"].attempts)

    assert await seeds("a") == await seeds("a") != await seeds("b")
    assert await seeds(None) != await seeds(None)
    assert await seeds("a", seed=5) == await seeds("b", seed=5)


BAD = {
    "no cursor": ({"Last-Event-ID": "nonsense", "X-Request-Id": "a"}, {}, "such as 12 or 12f"),
    "too far": ({"Last-Event-ID": "9", "X-Request-Id": "a"}, {}, "token 9 of a choice that has 8 at most"),
    "beyond its end": ({"Last-Event-ID": "6", "X-Request-Id": "a"}, {"stop_token_ids": [1002]}, "which has 3 tokens"),
    "another end": ({"Last-Event-ID": "6f", "X-Request-Id": "a"}, {}, "is it of this request?"),
    "no name": ({"Last-Event-ID": "3"}, {}, "needs the X-Request-Id"),
    "no stream": ({"Last-Event-ID": "3", "X-Request-Id": "a"}, {"stream": False}, "only a stream"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_wrong_cursor_is_refused_and_says_what_is_expected(text, case):
    headers, body, problem = BAD[case]
    async with House(text, pair()) as house:
        body = {"model": MODEL, "prompt": "hello", "max_tokens": 8, "stream": True, **body}
        async with house.session.post(f"{house.url}/v1/completions", json=body, headers=headers) as response:
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (400, "Last-Event-ID")
            assert problem in error["message"]
        await house.until_idle()


async def test_ids_are_for_those_who_name_their_request_and_can_be_switched_off(text):
    body = {"prompt": "hello"}
    async with House(text, pair()) as house:
        assert {event.id for event in await stream(house, "/v1/completions", body, name=None)} == {None}
    async with House(text, pair(), event_ids=False) as house:
        assert {event.id for event in await stream(house, "/v1/completions", body)} == {None}


async def test_an_answer_says_how_often_it_was_recovered(text):
    def workers() -> list[FakeWorker]:
        return [*pair(), FakeWorker("decode-1", Role.DECODE, 22)]

    body = {"model": MODEL, "prompt": "hello", "max_tokens": 8}
    async with House(text, workers()) as house:
        async with house.session.post(f"{house.url}/v1/completions", json=body) as response:
            assert "X-Baton-Recoveries" not in response.headers
        for number in range(2):
            house.workers[f"decode-{number}"].behaviour = Behaviour(fails_at=3)
        async with house.session.post(f"{house.url}/v1/completions", json=body) as response:
            assert response.headers["X-Baton-Recoveries"] == "1"
        async with opened(house, "/v1/completions", body) as response:
            told = (await response.read()).decode()
            assert told.endswith("\n\n: X-Baton-Recoveries: 1\ndata: [DONE]\n\n")
        for number in range(2):
            house.workers[f"decode-{number}"].behaviour = Behaviour()
        house.workers["prefill-0"].behaviour = Behaviour(fails_at=0)
        async with opened(house, "/v1/completions", body) as response:
            assert response.headers["X-Baton-Recoveries"] == "1", "before the first token there is time for a header"

"""Clients as they are in the wild: prompts and answers of all lengths, and many who leave at some moment or other."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tests.process.api import MODEL, Api

LONGEST_PROMPT = 1500
LONGEST_ANSWER = 200
LONGEST_PATIENCE = 4.0
"""Seconds; long enough to be in anybody's hands by then."""


class Leaves(Enum):
    NEVER = "never"
    WHILE_SENDING = "while it sends its request"
    AFTER_A_TIME = "after a time"
    WHILE_READING = "while it reads"


class Visit(NamedTuple):
    """One request, and when its client goes away."""

    name: str
    """Its X-Request-Id."""
    prompt: list[int]
    answer_tokens: int
    stream: bool
    leaves: Leaves
    patience: float
    """Seconds until it leaves, for AFTER_A_TIME."""
    tokens: int
    """After which it leaves, for WHILE_READING."""


def plan_visit(seed: int, number: int, corpus: Sequence[int]) -> Visit:
    """Visit `number` of a seed's endless series. Lengths and patience are log-uniform: short ones are common."""
    draw = random.Random(f"{seed}/{number}")
    length = _log_uniform(draw, LONGEST_PROMPT)
    start = draw.randrange(len(corpus) - length)
    answer = _log_uniform(draw, LONGEST_ANSWER)
    weights = {Leaves.NEVER: 8, Leaves.WHILE_SENDING: 1, Leaves.AFTER_A_TIME: 7, Leaves.WHILE_READING: 4}
    (leaves,) = draw.choices(list(weights), list(weights.values()))
    return Visit(
        name=f"visit-{seed}-{number}",
        prompt=list(corpus[start : start + length]),
        answer_tokens=answer,
        stream=leaves is Leaves.WHILE_READING or draw.random() < 0.5,
        leaves=leaves,
        patience=LONGEST_PATIENCE ** draw.uniform(-4, 1),
        tokens=1 if draw.random() < 0.5 else draw.randint(1, answer),
    )


async def play(api: Api, visit: Visit) -> None:
    """Asks, and leaves when it is time. Whoever stays to the end checks that the answer is whole."""
    if visit.leaves is Leaves.WHILE_SENDING:
        await _send_half(api, visit)
        return
    asking = asyncio.ensure_future(_ask(api, visit))
    await asyncio.wait({asking}, timeout=visit.patience if visit.leaves is Leaves.AFTER_A_TIME else None)
    if not asking.done():
        asking.cancel()
    await asyncio.gather(asking, return_exceptions=not asking.done())


async def play_all(api: Api, visits: Sequence[Visit], at_once: int) -> None:
    turn = asyncio.Semaphore(at_once)

    async def one(visit: Visit) -> None:
        async with turn:
            await play(api, visit)

    await asyncio.gather(*(one(visit) for visit in visits))


async def moments_of_leaving(api: Api, visits: Sequence[Visit]) -> Counter[str]:
    """Where the requests that were cancelled were at that moment, by the router's records."""
    found: Counter[str] = Counter()
    for visit in visits:
        async with api.session.get(f"{api.url}/v1/requests/{visit.name}") as response:
            record = await response.json() if response.status == 200 else None
        if record is None or record["finish_reason"] == "cancelled":
            found[_moment(record)] += 1
    return found


def _moment(record: dict[str, Any] | None) -> str:
    if record is None:
        return "before placement"
    if record["queue_seconds"] is None:
        return "queue"
    if record["first_token_seconds"] is None:
        return "prefill"
    return "handoff" if record["output_tokens"] == 1 else "decode"


async def _ask(api: Api, visit: Visit) -> None:
    headers = {"X-Request-Id": visit.name}
    async with api.session.post(f"{api.url}/v1/completions", json=_body(visit), headers=headers) as response:
        assert response.status == 200, await response.text()
        if not visit.stream:
            answer = await response.json()
            assert answer["usage"]["completion_tokens"] == visit.answer_tokens
            return
        read = 0
        async for line in response.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line.removeprefix(b"data: "))
                assert "error" not in chunk, chunk
                read += sum(len(choice["token_ids"]) for choice in chunk["choices"])
            if visit.leaves is Leaves.WHILE_READING and read >= visit.tokens:
                return
        assert read == visit.answer_tokens


async def _send_half(api: Api, visit: Visit) -> None:
    """Half of a request, and the connection closes."""
    address, body = urlsplit(api.url), json.dumps(_body(visit)).encode()
    _, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nX-Request-Id: {visit.name}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body[: len(body) // 2])
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def _body(visit: Visit) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": visit.prompt,
        "max_tokens": visit.answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": visit.stream,
        "return_token_ids": True,
    }


def _log_uniform(draw: random.Random, most: int) -> int:
    """From 1 to `most`, both included."""
    return min(most, int((most + 1) ** draw.random()))

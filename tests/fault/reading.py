"""A client that reads its stream to the end, whatever it takes: when the router dies, it asks again for the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Protocol

import aiohttp
import msgspec

from tests.fault.answers import Answer, ChoiceAnswer
from tests.fault.questions import Question

AGAIN_SECONDS = 0.1
"""Between two tries to reach a router that is away."""
LONGEST_SECONDS = 120.0
"""A request that takes longer has failed."""


class Outage(Protocol):
    """What a client may know of its router: it has been away since a time, or it has not."""

    def since(self, moment: float) -> bool: ...


class Event(NamedTuple):
    """One whole event of a stream."""

    cursor: str | None
    data: bytes


class StreamBroke(Exception):
    """The connection ended before [DONE]."""


class Reading:
    """One request, from its first byte to [DONE], over as many connections as it takes. Times are monotonic."""

    def __init__(self, name: str, question: Question) -> None:
        self.name = name
        """Its X-Request-Id."""
        self.question = question
        self.answer = Answer([ChoiceAnswer() for _ in range(question.body.get("n", 1))])
        self.arrivals: list[list[float]] = [[] for _ in self.answer.choices]
        """When each token of each choice came."""
        self.sent_at = 0.0
        self.ended_at: float | None = None
        self.connections = 0
        self.notes: list[tuple[float, str]] = []
        """What happened, with the time."""
        self.error: str | None = None
        self._cursor: str | None = None

    @property
    def begun(self) -> bool:
        return any(self.arrivals)

    async def read(self, session: aiohttp.ClientSession, url: str, outage: Outage) -> None:
        """Returns when it has ended; `error` says if that was no good end. Cancelling is a client that leaves."""
        self.sent_at = time.monotonic()
        try:
            await asyncio.wait_for(self._read_on(session, url, outage), LONGEST_SECONDS)
        except asyncio.TimeoutError:
            self.error = f"it did not end within {LONGEST_SECONDS:g} s"
        self.ended_at = time.monotonic()
        self._note(f"ended: {self.error or 'well'}, {self.answer.tokens} tokens")

    async def _read_on(self, session: aiohttp.ClientSession, url: str, outage: Outage) -> None:
        while True:
            asked_at = time.monotonic()
            try:
                await self._connect(session, url)
            except (aiohttp.ClientError, ConnectionError, StreamBroke) as error:
                if not outage.since(asked_at):
                    self.error = f"{type(error).__name__}: {error}"
                    return
                self._note(f"goes on after {self._cursor or 'nothing'}: {type(error).__name__}: {error}")
                await asyncio.sleep(AGAIN_SECONDS)
            else:
                return

    async def _connect(self, session: aiohttp.ClientSession, url: str) -> None:
        headers = {"X-Request-Id": self.name}
        if self._cursor is not None:
            headers["Last-Event-ID"] = self._cursor
        self.connections += 1
        async with session.post(f"{url}{self.question.path}", json=self.question.body, headers=headers) as response:
            if response.status == 503:
                raise StreamBroke(f"HTTP 503: {(await response.text())[:300]}")
            if response.status != 200:
                self.error = f"HTTP {response.status}: {(await response.text())[:300]}"
                return
            async for event in _events(response.content):
                if event.data == b"[DONE]":
                    return
                if not self._take(msgspec.json.decode(event.data)):
                    return
                self._cursor = event.cursor or self._cursor
        raise StreamBroke("the stream ended without [DONE]")

    def _take(self, chunk: dict[str, Any]) -> bool:
        if "error" in chunk:
            self.error = str(chunk["error"])
            return False
        now = time.monotonic()
        for choice, count in self.answer.add(chunk):
            self.arrivals[choice] += [now] * count
        return True

    def _note(self, what: str) -> None:
        self.notes.append((time.monotonic(), what))


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[Event]:
    """Server-sent events; the beginning of one whose end does not come is none."""
    cursor: str | None = None
    data: list[bytes] = []
    async for line in content:
        name, _, value = line.rstrip(b"\r\n").partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        elif name == b"id":
            cursor = value.removeprefix(b" ").decode()
        elif not line.strip() and data:
            yield Event(cursor, b"\n".join(data))
            cursor, data = None, []

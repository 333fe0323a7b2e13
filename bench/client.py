"""A client of any OpenAI-compatible `/v1/completions` that remembers when each token came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import aiohttp
import msgspec

MAX_EVENT_BYTES = 4 * 1024 * 1024
CHUNK_PREFIX = b"data:"
LAST_CHUNK = b"[DONE]"
SILENCE_SECONDS = 120.0
"""An endpoint that says nothing for so long has failed."""

OPTIONS: Mapping[str, Any] = MappingProxyType({"ignore_eos": True, "temperature": 0, "return_token_ids": True})
"""Of each request: random prompts must not end early, and chunks tell which tokens they carry."""


def open_session(*, keep_connections: bool = True) -> aiohttp.ClientSession:
    """Without a limit of connections: the load is what a workload says, not what a client allows."""
    timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_SECONDS)
    connector = aiohttp.TCPConnector(limit=0, force_close=not keep_connections)
    return aiohttp.ClientSession(timeout=timeout, connector=connector)


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """What the server says it read and wrote for a request."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptDetails | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return 0 if details is None else details.cached_tokens or 0


class Timeline(msgspec.Struct, kw_only=True):
    """What a client saw of one request; times are of the monotonic clock, in seconds."""

    stream: str
    prompt_tokens: int
    sent_at: float
    id: str = ""
    """The server's name for the request."""
    arrivals: list[float] = msgspec.field(default_factory=list)
    """When each chunk that carries tokens came."""
    counts: list[int] = msgspec.field(default_factory=list)
    """Tokens of each of these chunks."""
    token_ids: list[int] = msgspec.field(default_factory=list)
    """All of them; empty if the server does not tell."""
    ended_at: float | None = None
    """None while it runs, and for good if the client went away."""
    finish_reason: str | None = None
    usage: Usage | None = None
    """None where the server does not tell, or has not yet."""
    error: str | None = None

    @property
    def first_token_seconds(self) -> float | None:
        return self.arrivals[0] - self.sent_at if self.arrivals else None

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def longest_gap_seconds(self) -> float:
        """The longest time without a token, from the first one on; 0 for fewer than two."""
        return max((later - earlier for earlier, later in pairwise(self.arrivals)), default=0.0)

    def by(self, clock: Callable[[float], float]) -> Timeline:
        """The same by another clock, which tells its time for one of the monotonic clock."""
        ended = None if self.ended_at is None else clock(self.ended_at)
        arrivals = [clock(at) for at in self.arrivals]
        return msgspec.structs.replace(self, sent_at=clock(self.sent_at), arrivals=arrivals, ended_at=ended)

    def tokens_between(self, start: float, end: float) -> int:
        """Tokens that came in [start, end)."""
        return sum(count for at, count in zip(self.arrivals, self.counts, strict=True) if start <= at < end)

    def gaps_between(self, start: float, end: float, *, first: bool = False) -> list[float]:
        """Seconds from one token-carrying chunk to the next, for those that came in [start, end). With `first`, only
        that to the second chunk: in a split cluster, what the client notices of the handoff."""
        arrivals = self.arrivals[:2] if first else self.arrivals
        return [later - earlier for earlier, later in pairwise(arrivals) if start <= later < end]


class CompletionClient:
    """Streams completions of token-id prompts. `options` goes into each request's body as it is.

    For servers that are less strict than ours: `as_text` makes of a prompt the text of these tokens, where ids are not
    taken; with `says_done` false, a stream may end without [DONE] once a finish reason has come.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: str,
        options: Mapping[str, Any],
        *,
        as_text: Callable[[list[int]], str] | None = None,
        says_done: bool = True,
    ) -> None:
        self._session = session
        self._url = f"{url.rstrip('/')}/v1/completions"
        self._model = model
        self._options = dict(options)
        self._as_text = as_text
        self._says_done = says_done

    async def stream(self, timeline: Timeline, prompt: list[int], max_tokens: int) -> None:
        """Sends one request and fills `timeline` as the answer comes. An HTTP or connection error is noted there:
        under load it is a result. Cancelling disconnects."""
        written = prompt if self._as_text is None else self._as_text(prompt)
        body = {"model": self._model, "prompt": written, "max_tokens": max_tokens, "stream": True, **self._options}
        timeline.sent_at = time.monotonic()
        try:
            async with self._session.post(self._url, json=body, read_bufsize=MAX_EVENT_BYTES) as response:
                if response.status != 200:
                    timeline.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                else:
                    await self._read(response, timeline)
        except (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError) as error:
            timeline.error = f"{type(error).__name__}: {error}"
        timeline.ended_at = time.monotonic()

    async def _read(self, response: aiohttp.ClientResponse, timeline: Timeline) -> None:
        async for line in response.content:
            if not line.startswith(CHUNK_PREFIX):
                continue
            payload = line[len(CHUNK_PREFIX) :].strip()
            if payload == LAST_CHUNK:
                return
            _note(timeline, msgspec.json.decode(payload), time.monotonic())
        if self._says_done or timeline.finish_reason is None:
            timeline.error = timeline.error or "the stream ended without [DONE]"


def _note(timeline: Timeline, chunk: dict[str, Any], now: float) -> None:
    if "error" in chunk:
        timeline.error = str(chunk["error"])
        return
    timeline.id = timeline.id or str(chunk.get("id", ""))
    for choice in chunk.get("choices", ()):
        # Servers that don't tell token ids are taken to send one token a chunk.
        tokens = choice.get("token_ids")
        count = len(tokens) if tokens is not None else int(bool(choice.get("text")))
        if count:
            timeline.arrivals.append(now)
            timeline.counts.append(count)
            timeline.token_ids += tokens or ()
        timeline.finish_reason = choice.get("finish_reason") or timeline.finish_reason
    if chunk.get("usage"):
        timeline.usage = msgspec.convert(chunk["usage"], Usage)
        if timeline.counts:
            # A server that sends text keeps back what is no whole character yet, and so sends fewer chunks than tokens.
            timeline.counts[-1] += max(0, timeline.usage.completion_tokens - timeline.tokens)

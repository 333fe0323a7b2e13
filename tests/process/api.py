"""The router's API as a test needs it: plain aiohttp, nothing hidden by an SDK."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

MODEL = "smollm2-135m-instruct"
POLL_SECONDS = 0.05


class StreamError(Exception):
    """The stream carried an error object."""


@dataclass
class Completion:
    """One choice, put together from a stream or read from a whole answer."""

    id: str = ""
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Api:
    """Talks to one router. `session` outlives it."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.session = session
        self.url = url

    async def complete(self, prompt: list[int] | str, **parameters: Any) -> Completion:
        """A whole, not streamed, completion of one choice."""
        body = {"model": MODEL, "prompt": prompt, "return_token_ids": True, **parameters}
        choice = (await self._whole("/v1/completions", body))["choices"][0]
        found = choice["logprobs"]["token_logprobs"] if choice.get("logprobs") else []
        return Completion(
            text=choice["text"],
            tokens=choice["token_ids"],
            logprobs=found,
            prompt=choice["prompt_token_ids"],
            finish_reason=choice["finish_reason"],
        )

    async def chat(self, messages: list[dict[str, str]], **parameters: Any) -> Completion:
        """A whole chat answer of one choice."""
        body = {"model": MODEL, "messages": messages, "return_token_ids": True, **parameters}
        choice = (await self._whole("/v1/chat/completions", body))["choices"][0]
        entries = choice["logprobs"]["content"] if choice.get("logprobs") else []
        return Completion(
            text=choice["message"]["content"],
            tokens=choice["token_ids"],
            logprobs=[entry["logprob"] for entry in entries],
            prompt=choice["prompt_token_ids"],
            finish_reason=choice["finish_reason"],
        )

    async def stream(self, prompt: list[int] | str, **parameters: Any) -> Completion:
        """A streamed completion of one choice, read to its end. Raises `StreamError`."""
        found = Completion()
        async with self.open_stream(prompt, **parameters) as chunks:
            async for chunk in chunks:
                found.id = chunk["id"]
                for choice in chunk["choices"]:
                    found.text += choice["text"]
                    found.tokens += choice.get("token_ids") or []
                    found.logprobs += (choice.get("logprobs") or {}).get("token_logprobs", [])
                    found.finish_reason = choice["finish_reason"] or found.finish_reason
        return found

    @asynccontextmanager
    async def open_stream(self, prompt: list[int] | str, **parameters: Any) -> AsyncIterator[AsyncIterator[dict]]:
        """The chunks as they come; leaving the block early is a client that goes away. Raises `StreamError`."""
        body = {"model": MODEL, "prompt": prompt, "return_token_ids": True, "stream": True, **parameters}
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise StreamError(f"HTTP {response.status}: {await response.text()}")
            yield _chunks(response)

    async def _whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self.session.post(f"{self.url}{path}", json=body) as response:
            answer: dict[str, Any] = await response.json()
            assert response.status == 200, answer
            return answer

    async def metric(self, name: str) -> float:
        """The value of one of the router's unlabelled metrics."""
        async with self.session.get(f"{self.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[dict]:
    async for line in response.content:
        payload = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:"):
            continue
        if payload == b"[DONE]":
            return
        chunk = json.loads(payload)
        if "error" in chunk:
            raise StreamError(chunk["error"]["message"])
        yield chunk
    raise StreamError("the stream ended without [DONE]")


async def eventually(condition: Callable[[], Awaitable[bool]], what: str, seconds: float = 20.0) -> None:
    """Waits until `condition` holds; fails the test, naming `what`, if it does not within `seconds`."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not await condition():
        assert loop.time() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(POLL_SECONDS)

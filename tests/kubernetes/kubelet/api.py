"""The API server as a node agent needs it: objects are plain dictionaries, as its JSON has them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import msgspec

Json = dict[str, Any]
RETRY_SECONDS = 0.5
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
"""Merges lists by the keys of their elements."""


class ApiError(Exception):
    """The server said no. `status` as HTTP has it."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status


class Api:
    """One API server. `session` belongs to the caller, and carries the credentials."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def get(self, path: str) -> Json:
        return await self._ask("GET", path)

    async def create(self, path: str, body: Json) -> Json:
        return await self._ask("POST", path, body)

    async def patch(self, path: str, body: Json, kind: str = MERGE) -> Json:
        return await self._ask("PATCH", path, body, kind)

    async def delete(self, path: str, body: Json) -> Json:
        return await self._ask("DELETE", path, body)

    async def follow(self, path: str, selector: str = "") -> AsyncIterator[list[Json]]:
        """All objects of a collection, again with each change, for ever."""
        objects: dict[str, Json] = {}
        while True:
            try:
                listed = await self.get(f"{path}?fieldSelector={selector}")
                objects = {each["metadata"]["uid"]: each for each in listed["items"]}
                yield list(objects.values())
                version = listed["metadata"]["resourceVersion"]
                async for event in self._watch(path, {"fieldSelector": selector, "resourceVersion": version}):
                    if event["type"] == "ERROR":
                        break  # too far behind: begin again
                    if event["type"] == "DELETED":
                        objects.pop(event["object"]["metadata"]["uid"], None)
                    else:
                        objects[event["object"]["metadata"]["uid"]] = event["object"]
                    yield list(objects.values())
            except (aiohttp.ClientError, asyncio.TimeoutError, ApiError):
                await asyncio.sleep(RETRY_SECONDS)

    async def _watch(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Json]:
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.get(
            f"{self._url}{path}", params={**query, "watch": "1"}, timeout=timeout, read_bufsize=2**22
        ) as response:
            async for line in response.content:
                yield msgspec.json.decode(line)

    async def _ask(self, method: str, path: str, body: Json | None = None, kind: str = "application/json") -> Json:
        """Raises `ApiError`, and aiohttp's errors where nobody answers."""
        data = None if body is None else msgspec.json.encode(body)
        async with self._session.request(
            method, f"{self._url}{path}", data=data, headers={"Content-Type": kind}
        ) as response:
            answer: Json = msgspec.json.decode(await response.read())
            if response.status >= 400:
                raise ApiError(response.status, str(answer.get("message")))
            return answer

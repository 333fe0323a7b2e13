"""A worker's `POST /profile/start` and `/profile/stop`: traces of what its engine process computes."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from cluster.engine_messages import ProfileReply, StartProfile, StopProfile
from cluster.errors import BatonError, Draining, InvalidRequest, WorkerLost, from_info
from cluster.messages import (
    Message,
)

DEFAULT_STEPS = 20
MOST_STEPS = 1000
"""Writing them takes a minute, in which the worker serves nobody."""


class ProfileRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `/profile/start`; may be empty."""

    steps: Annotated[int, Meta(ge=1, le=MOST_STEPS)] = DEFAULT_STEPS
    """Engine steps after which it ends by itself, if nobody stops it before."""


class ProfileFile(msgspec.Struct, frozen=True):
    """A Chrome trace, gzipped, on the worker's host. After `start` it is not there before the profile's end."""

    file: str


class ProfileApi:
    """Asks the engine process, which answers in the order of the questions. `post` gives it a message, `ready` says
    whether it is there. Lives on the control process's event loop."""

    def __init__(
        self, worker: str, folder: str | None, post: Callable[[Message], None], ready: Callable[[], bool]
    ) -> None:
        self._worker = worker
        self._folder = Path(folder or Path(tempfile.gettempdir()) / "baton-profiles")
        self._post = post
        self._ready = ready
        self._numbers = itertools.count(1)
        self._asked: deque[asyncio.Future[ProfileReply]] = deque()

    def add_routes(self, app: web.Application) -> None:
        app.router.add_post("/profile/start", self._told(self._start))
        app.router.add_post("/profile/stop", self._told(self._stop))

    def answer(self, reply: ProfileReply) -> None:
        """What the engine process said to the oldest question; whoever asked may have gone."""
        waiter = self._asked.popleft()
        if not waiter.done():
            waiter.set_result(reply)

    def engine_gone(self) -> None:
        """Nobody will answer what was asked."""
        lost = WorkerLost(f"{self._worker}'s engine process ended")
        while self._asked:
            self.answer(ProfileReply(error=lost.to_info()))

    async def _start(self, request: web.Request) -> ProfileFile:
        try:
            wanted = msgspec.json.decode(await request.read() or b"{}", type=ProfileRequest)
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"the body: {error}") from error
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        name = f"{self._worker}-{moment}-{next(self._numbers)}.trace.json.gz"
        return await self._ask(StartProfile(str((self._folder / name).absolute()), wanted.steps))

    async def _stop(self, request: web.Request) -> ProfileFile:
        return await self._ask(StopProfile())

    async def _ask(self, question: StartProfile | StopProfile) -> ProfileFile:
        """Waits for the step under way, and for the file where one is written. Raises what the engine process says."""
        if not self._ready():
            raise Draining(f"{self._worker} is still starting")
        waiter: asyncio.Future[ProfileReply] = asyncio.get_running_loop().create_future()
        self._asked.append(waiter)
        self._post(question)
        reply = await waiter
        if reply.error is not None:
            raise from_info(reply.error)
        return ProfileFile(reply.file)

    @staticmethod
    def _told(
        handler: Callable[[web.Request], Awaitable[ProfileFile]],
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def respond(request: web.Request) -> web.Response:
            status, body = 200, b""
            try:
                body = msgspec.json.encode(await handler(request))
            except BatonError as error:
                status, body = error.status, msgspec.json.encode({"error": error.to_info()})
            return web.Response(body=body, status=status, content_type="application/json")

        return respond

"""The end of a router in order: it answers what it has begun, and refuses the rest, before it closes its port."""

from __future__ import annotations

import asyncio
import contextlib

from aiohttp import web
from aiohttp.typedefs import Handler


class Drain:
    """Counts the requests that are being answered. Lives on the router's event loop."""

    def __init__(self) -> None:
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._asked = asyncio.Event()

    def watch(self, app: web.Application) -> None:
        """Before the application starts."""

        @web.middleware
        async def count(request: web.Request, handler: Handler) -> web.StreamResponse:
            self._under_way += 1
            self._idle.clear()
            try:
                return await handler(request)
            finally:
                self._under_way -= 1
                if self._under_way == 0:
                    self._idle.set()

        app.middlewares.append(count)

    def ask(self) -> None:
        self._asked.set()

    async def done(self, seconds: float) -> None:
        """Once asked for: returns when nothing is being answered any more, or after so many seconds."""
        await self._asked.wait()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

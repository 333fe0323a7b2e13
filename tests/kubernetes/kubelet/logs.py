"""What `kubectl logs` asks a node for, by way of the API server."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from pathlib import Path
from typing import Protocol

from aiohttp import web

POLL_SECONDS = 0.1
_CHUNK = 65536


class FindLog(Protocol):
    def __call__(self, namespace: str, name: str, container: str, *, previous: bool) -> Path | None: ...


class LogServer:
    def __init__(self, find: FindLog, tls: ssl.SSLContext) -> None:
        self._find = find
        self._tls = tls
        app = web.Application()
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True)

    async def start(self, address: str) -> int:
        """The port that was found."""
        await self._runner.setup()
        await web.TCPSite(self._runner, address, 0, ssl_context=self._tls).start()
        return int(self._runner.addresses[0][1])

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        place = (request.match_info["namespace"], request.match_info["pod"], request.match_info["container"])
        path = self._find(*place, previous=request.query.get("previous") == "true")
        if path is None or not path.exists():
            return web.Response(status=404, text=f"there is no log of {'/'.join(place)}")
        response = web.StreamResponse()
        await response.prepare(request)
        with path.open("rb") as log:
            if "tailLines" in request.query:
                lines = deque(log, maxlen=int(request.query["tailLines"]))
                await response.write(b"".join(lines))
            while True:
                if chunk := log.read(_CHUNK):
                    await response.write(chunk)
                elif request.query.get("follow") == "true":
                    await asyncio.sleep(POLL_SECONDS)
                else:
                    return response

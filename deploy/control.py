"""How other commands reach a `baton up`: HTTP on a Unix socket that only its user can open, see `deploy.run_directory`.

    GET  /replicas                                   what `Cluster.status` says
    POST /scale    {"sizes": {"decode": 4}}          a line of JSON for each news, the last one with its end
    POST /drain    {"workers": ["decode-1"]}         the same
    POST /restart  {"workers": []}                   the same
    POST /stop                                       202; the cluster stops as by Ctrl-C

What was asked for is done to its end, also when who asked is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from cluster.errors import BatonError, ErrorInfo, InvalidRequest
from cluster.messages import Role
from cluster.tasks import cancel
from deploy.launchers.base import Cluster


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be done; each kind reads its own fields."""

    sizes: dict[Role, int] = {}
    workers: list[str] = []
    patience_seconds: float = 900.0
    """For one worker to be ready."""


class News(msgspec.Struct, frozen=True, omit_defaults=True):
    line: str = ""
    done: bool = False
    error: ErrorInfo | None = None
    """With `done`: what it could not do."""


ClusterFor = Callable[[Callable[[str], None], float], Cluster]
"""The cluster of one who is told what happens, and has so much patience in seconds."""


@asynccontextmanager
async def listening(cluster_for: ClusterFor, socket: Path) -> AsyncIterator[None]:
    """While the block runs, orders are taken; what is being done at its end is left as it is."""
    control = Control(cluster_for)
    runner = web.AppRunner(control.application(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(socket)).start()
        yield
    finally:
        await control.close()
        await runner.cleanup()


class Control:
    """Carries orders from the network to a cluster."""

    def __init__(self, cluster_for: ClusterFor) -> None:
        self._cluster_for = cluster_for
        self._working: set[asyncio.Task[None]] = set()

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/replicas", self._replicas)
        app.router.add_post("/scale", self._scale)
        app.router.add_post("/drain", self._drain)
        app.router.add_post("/restart", self._restart)
        app.router.add_post("/stop", self._stop)
        return app

    async def close(self) -> None:
        await cancel(*self._working)

    async def _replicas(self, request: web.Request) -> web.Response:
        replicas = await self._cluster_for(lambda _line: None, 0.0).status()
        return web.Response(body=msgspec.json.encode(replicas), content_type="application/json")

    async def _stop(self, request: web.Request) -> web.Response:
        os.kill(os.getpid(), signal.SIGTERM)
        return web.Response(status=202)

    async def _scale(self, request: web.Request) -> web.StreamResponse:
        return await self._work(request, lambda cluster, order: cluster.scale(order.sizes))

    async def _drain(self, request: web.Request) -> web.StreamResponse:
        return await self._work(request, lambda cluster, order: cluster.drain(order.workers))

    async def _restart(self, request: web.Request) -> web.StreamResponse:
        return await self._work(request, lambda cluster, order: cluster.restart(order.workers))

    async def _work(
        self, request: web.Request, work: Callable[[Cluster, Order], Coroutine[Any, Any, None]]
    ) -> web.StreamResponse:
        try:
            order = msgspec.json.decode(await request.read(), type=Order)
        except msgspec.DecodeError as error:
            return web.Response(status=InvalidRequest.status, text=str(error))
        told: asyncio.Queue[News] = asyncio.Queue()
        cluster = self._cluster_for(lambda line: told.put_nowait(News(line)), order.patience_seconds)
        working = asyncio.ensure_future(_tell_end(work(cluster, order), told))
        self._working.add(working)
        working.add_done_callback(self._working.discard)
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):  # who asked is gone
            while True:
                news = await told.get()
                await response.write(msgspec.json.encode(news) + b"\n")
                if news.done:
                    break
        return response


async def _tell_end(work: Coroutine[Any, Any, None], told: asyncio.Queue[News]) -> None:
    try:
        await work
    except BatonError as error:
        told.put_nowait(News(done=True, error=error.to_info()))
    else:
        told.put_nowait(News(done=True))

"""A worker as the control plane sees it: it registers, heartbeats, serves routers' links, and computes nothing.

An attempt is answered at once, with token 0 over and over. A prefill worker follows the roster, as the real one does;
it dials no decode worker, since links between workers are no load of the control plane.
"""

from __future__ import annotations

import asyncio
import time

import aiohttp
from aiohttp import web

from cluster.access.security import ClusterSecurity
from cluster.config import Topology
from cluster.errors import ProtocolError
from cluster.http_server import HttpServer
from cluster.layout import KVLayout
from cluster.links import Backoff, Link, LinkClosed, accept, dial
from cluster.messages import (
    AttemptFinished,
    AttemptStarted,
    DecodeAttempt,
    Emitted,
    FinishReason,
    Heartbeat,
    Load,
    Member,
    Message,
    ModelCard,
    PrefillAttempt,
    Register,
    Registered,
    Role,
    RouterHello,
    Tokens,
    Watch,
    WorkerHello,
)
from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings

LAYOUT = KVLayout(model="none", dtype="bfloat16", page_size=16, layers=32, kv_heads=8, head_dim=128)
POOL_PAGES = 8192
MAX_RUNNING = 256
SHUTDOWN_SECONDS = 0.1


class SimulatedWorker:
    """One worker of a swarm: `start`, then `cut` or `hush`, and `start` again for its next life."""

    def __init__(
        self, index: int, topology: Topology, session: aiohttp.ClientSession, security: ClusterSecurity
    ) -> None:
        """Even ones prefill, odd ones decode."""
        self.role = Role.DECODE if index % 2 else Role.PREFILL
        self.name = f"{self.role.value}-{index // 2}"
        self.registered = 0
        """How often bootstrap has accepted it."""
        self.heard = 0
        """Messages that its watch of the roster has brought."""
        self._topology = topology
        self._session = session
        self._security = security
        self._server: HttpServer | None = None
        self._routers: dict[Link, asyncio.Transport] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._silent = False

    async def start(self, card: ModelCard) -> None:
        """A new life, with a new epoch and a port of its own."""
        await self.cut()
        app = web.Application()
        app.router.add_get("/router", self._serve)
        self._security.guard(app, lambda reason: None)
        self._server = HttpServer(app, SHUTDOWN_SECONDS, self._security.server_tls)
        url = await self._server.start("127.0.0.1", 0, "choose another port")
        self._member = Member(self.name, self.role, time.time_ns(), url, LAYOUT, card, "nixl", POOL_PAGES, MAX_RUNNING)
        self._silent = False
        self._tasks = [asyncio.create_task(self._belong()), asyncio.create_task(self._beat())]
        if self.role is Role.PREFILL:
            self._tasks.append(asyncio.create_task(self._follow()))

    async def cut(self) -> None:
        """The process is gone: each of its connections breaks, and nobody listens any more."""
        for transport in self._routers.values():
            transport.abort()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server, self._server = self._server, None
        if server is not None:
            await server.stop()

    def hush(self) -> None:
        """It stops: its connections stand, and nothing comes any more."""
        self._silent = True

    # --- bootstrap ---------------------------------------------------------------------------------------------------

    async def _belong(self) -> None:
        """Keeps the membership, as a real worker does: again and again, with the same pauses."""
        backoff = Backoff()
        while True:
            try:
                link = await dial(self._session, f"{self._topology.bootstrap_url}/members")
            except LinkClosed:
                await asyncio.sleep(backoff.next())
                continue
            beating: asyncio.Task[None] | None = None
            try:
                link.post(Register(self._member))
                while True:
                    message = await link.receive()
                    if isinstance(message, Registered) and beating is None:
                        backoff.reset()
                        self.registered += 1
                        beating = asyncio.create_task(self._beat_at(link, message.heartbeat_seconds))
            except (LinkClosed, ProtocolError):
                pass
            finally:
                if beating is not None:
                    beating.cancel()
                await link.close()
            await asyncio.sleep(backoff.next())

    async def _beat_at(self, link: Link, interval: float) -> None:
        while True:
            self._say(link, self._heartbeat())
            await asyncio.sleep(interval)

    async def _follow(self) -> None:
        """Hears what bootstrap tells of the others."""
        backoff = Backoff()
        while True:
            try:
                link = await dial(self._session, f"{self._topology.bootstrap_url}/watch")
            except LinkClosed:
                await asyncio.sleep(backoff.next())
                continue
            try:
                link.post(Watch(self.name))
                while True:
                    await link.receive()
                    backoff.reset()
                    self.heard += 1
            except (LinkClosed, ProtocolError):
                pass
            finally:
                await link.close()
            await asyncio.sleep(backoff.next())

    # --- routers -----------------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            for link in self._routers:
                self._say(link, self._heartbeat())
            await asyncio.sleep(self._topology.bootstrap.heartbeat_seconds)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        link = await accept(request)
        try:
            if isinstance(await link.receive(), RouterHello):
                link.post(WorkerHello(self._member))
                assert request.transport is not None
                self._routers[link] = request.transport
                while True:
                    message = await link.receive()
                    if isinstance(message, PrefillAttempt | DecodeAttempt):
                        for word in answer(message):
                            self._say(link, word)
        except (LinkClosed, ProtocolError):
            pass
        finally:
            self._routers.pop(link, None)
            await link.close()
        return web.Response()

    def _heartbeat(self) -> Heartbeat:
        load = Load(pages_total=POOL_PAGES, owners={"sequence": 0, "cache": 0, "quarantine": 0})
        return Heartbeat(self._member.worker, self._member.epoch, load)

    def _say(self, link: Link, message: Message) -> None:
        if not self._silent:
            link.post(message)


def answer(attempt: PrefillAttempt | DecodeAttempt) -> list[Message]:
    """All that a worker says to an attempt, from its start to its end."""
    fence, begun, limit = attempt.fence, len(attempt.output), attempt.sampling.max_tokens
    prefill = PrefillTimings(0.0, 0.001, tokens=len(attempt.prompt) + begun, cached_tokens=0, chunks=1)
    if isinstance(attempt, PrefillAttempt):
        first = Tokens([Emitted(fence, begun, 0)])
        started = AttemptStarted(fence, Role.PREFILL)
        if attempt.decode is None:
            return [started, first, AttemptFinished(fence, Role.PREFILL, FinishReason.LENGTH, prefill)]
        handoff = HandoffTimings(0.0, 0.001, 0.001, pages=1, bytes=LAYOUT.page_bytes)
        return [started, first, AttemptFinished(fence, Role.PREFILL, FinishReason.HANDED_OFF, prefill, handoff)]
    offset = begun if attempt.prefill is None else begun + 1
    timings = DecodeTimings(0.001, 0.001, steps=1, batch_sum=1)
    return [
        AttemptStarted(fence, Role.DECODE),
        Tokens([Emitted(fence, number, 0) for number in range(offset, limit)]),
        AttemptFinished(fence, Role.DECODE, FinishReason.LENGTH, decode=timings),
    ]

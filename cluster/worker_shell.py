"""The control process of a worker, but for what its role adds: HTTP, the routers' links, the engine process.

A role (`prefill_worker.control`, `decode_worker.control`) composes this with its own connections: to bootstrap, and to
the peers of the other pool. Everything here is relaying: no attempt's state lives in a control process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import msgspec
from aiohttp import web

from cluster.access.security import ClusterSecurity
from cluster.clock import MonotonicClock
from cluster.config import Topology
from cluster.engine_host import EngineHost
from cluster.engine_messages import (
    EngineLoad,
    EngineReady,
    FromRouter,
    ProfileEnded,
    ProfileReply,
    RouterGone,
    ToPeer,
    ToRouter,
)
from cluster.errors import Draining, ProtocolError, UnknownMessage
from cluster.http_server import HttpServer
from cluster.layout import SCHEMA_VERSION
from cluster.links import Link, LinkClosed, accept
from cluster.logging import get_logger
from cluster.messages import (
    AttemptFailed,
    AttemptFinished,
    CancelAttempt,
    DecodeAttempt,
    Heartbeat,
    Load,
    Member,
    Message,
    PeerHello,
    PrefillAttempt,
    Refused,
    Role,
    RouterHello,
    Tokens,
    WorkerHello,
)
from cluster.metrics import CONTENT_TYPE, WorkerMetrics, render
from cluster.profiling import ProfileApi

log = get_logger(__name__)

ATTEMPT_TYPES: Mapping[Role, type[PrefillAttempt] | type[DecodeAttempt]] = {
    Role.PREFILL: PrefillAttempt,
    Role.DECODE: DecodeAttempt,
}

SHUTDOWN_SECONDS = 1.0
"""For what is asked over HTTP at the end; attempts have ended before."""


class WorkerShell:
    """One worker's HTTP server and engine process. Made by `start`; `run` relays until the end; `close` in any case."""

    def __init__(self, name: str, role: Role, topology: Topology) -> None:
        self.name = name
        self.role = role
        self.topology = topology
        self._clock = MonotonicClock()
        self.metrics = WorkerMetrics(name, role)
        self.load = Load(ready=False)
        self.member: Member | None = None
        """Known once the engine process is ready."""
        self.on_peer_message: Callable[[ToPeer], None] = lambda message: None
        self.security = ClusterSecurity(topology.security)
        self.app = web.Application()
        self._engine: EngineHost | None = None
        self._engine_ready: EngineReady | None = None
        self._routers: dict[str, Link] = {}
        self.security.guard(self.app, self.metrics.unauthorized)
        self._server = HttpServer(self.app, SHUTDOWN_SECONDS, self.security.server_tls)
        self._draining = False
        self.app.router.add_get("/health", self._health)
        self.app.router.add_get("/ready", self._ready)
        self.app.router.add_get("/live", self._live)
        self.app.router.add_get("/metrics", self._render_metrics)
        self.app.router.add_get("/server_info", self._server_info)
        self.app.router.add_get("/router", self._serve_router)
        self._profiles = ProfileApi(name, topology.logging.profile_dir, self.post, lambda: self.member is not None)
        self._profiles.add_routes(self.app)

    async def start(
        self, host: str, port: int, module: str, arguments: Sequence[str], env: Mapping[str, str]
    ) -> Member:
        """Listens, starts the engine process and waits until it can work. Raises `ConfigError` if one can't."""
        self.security.require_for(host, f"{self.role.value}.host")
        url = await self._server.start(host, port, "choose another port")
        log.info("loading the model", model=self.topology.model.path, url=url)
        self._engine = await EngineHost.start(module, arguments, env)
        ready = self._engine_ready = await self._engine.ready()
        section = self.topology.prefill if self.role is Role.PREFILL else self.topology.decode
        self.member = Member(
            worker=self.name,
            role=self.role,
            epoch=ready.epoch,
            url=url,
            layout=ready.layout,
            model=ready.model,
            transfer=self.topology.kv.transfer.value,
            pool_pages=ready.pool_pages,
            max_running=section.max_running,
        )
        self.load = Load(pages_total=ready.pool_pages)
        log.info("engine ready", epoch=ready.epoch, pages=ready.pool_pages, layout=ready.layout.fingerprint)
        return self.member

    def hello(self) -> PeerHello:
        """How this worker introduces itself to the other pool; only after `start`."""
        assert self.member is not None
        assert self._engine_ready is not None
        return PeerHello(
            worker=self.name,
            role=self.role,
            epoch=self.member.epoch,
            layout=self.member.layout,
            transfer=self.member.transfer,
            descriptor=self._engine_ready.descriptor,
            engine=self._engine_ready.process,
        )

    def post(self, message: Message) -> None:
        """To the engine process."""
        if self._engine is not None:
            self._engine.post(message)

    async def run(self) -> None:
        """Relays until cancelled. Raises `WorkerLost` when the engine process dies."""
        assert self._engine is not None
        heartbeats = asyncio.create_task(self._heartbeats())
        try:
            while True:
                for message in await self._engine.receive():
                    if isinstance(message, ToRouter):
                        self._to_router(message)
                    elif isinstance(message, ToPeer):
                        self.on_peer_message(message)
                    elif isinstance(message, EngineLoad):
                        self.load = message.load
                        self.metrics.observe_load(message.load)
                    elif isinstance(message, ProfileReply):
                        self._profiles.answer(message)
                    elif isinstance(message, ProfileEnded):
                        log.info("profile written", file=message.file)
        finally:
            heartbeats.cancel()

    async def close(self) -> None:
        """Ends the links, the server and the engine process."""
        self._draining = True
        for link in list(self._routers.values()):
            await link.close()
        await self._server.stop()
        if self._engine is not None:
            await self._engine.close()

    def _to_router(self, envelope: ToRouter) -> None:
        link = self._routers.get(envelope.router)
        message = envelope.message
        if link is not None:
            link.post(message)
        if isinstance(message, Tokens):
            self.metrics.observe_tokens(len(message.tokens))
        elif isinstance(message, AttemptFinished):
            self._observe_finished(message)
        elif isinstance(message, AttemptFailed):
            self.metrics.attempt_ended("failed")
            log.warning("attempt failed", request=message.fence.request, error=message.error.message)

    def _observe_finished(self, message: AttemptFinished) -> None:
        self.metrics.attempt_ended(message.reason.value)
        for prefill in (message.prefill, message.decode.prefill if message.decode else None):
            if prefill is not None:
                self.metrics.observe_prefill(prefill)
        if message.handoff is not None:
            self.metrics.observe_handoff(message.handoff)
        if message.decode is not None:
            self.metrics.observe_decode(message.decode)
        log.info("attempt finished", request=message.fence.request, reason=message.reason.value)

    async def _heartbeats(self) -> None:
        assert self.member is not None
        while True:
            beat = Heartbeat(self.name, self.member.epoch, self.load)
            for link in self._routers.values():
                link.post(beat)
            await asyncio.sleep(self.topology.bootstrap.heartbeat_seconds)

    async def _serve_router(self, request: web.Request) -> web.StreamResponse:
        """One router's link: attempts in, tokens out, heartbeats all along."""
        link = await accept(request)
        router: str | None = None
        try:
            hello = await link.receive()
            router = self._admit_router(hello, link)
            while True:
                message = await link.receive()
                if not isinstance(message, (ATTEMPT_TYPES[self.role], CancelAttempt)):
                    raise UnknownMessage(f"{type(message).__name__} is not for a {self.role.value} worker")
                log.debug("from router", kind=type(message).__name__, request=message.fence.request)
                self.post(FromRouter(router, message, self._clock.now()))
        except LinkClosed as closed:
            log.info("router disconnected", router=router, reason=str(closed))
        except (ProtocolError, Draining) as error:
            log.warning("refused a router", router=router, error=str(error))
            self.metrics.refused("router")
            link.post(Refused(error.to_info()))
        finally:
            if router is not None and self._routers.get(router) is link:
                del self._routers[router]
                self.post(RouterGone(router))
            await link.close()
        return web.Response()

    def _admit_router(self, hello: object, link: Link) -> str:
        if not isinstance(hello, RouterHello):
            raise UnknownMessage(f"expected RouterHello, got {type(hello).__name__}")
        if hello.version != SCHEMA_VERSION:
            raise UnknownMessage(
                f"schema version {hello.version} is not ours ({SCHEMA_VERSION}): update the older side"
            )
        if self.member is None or self._draining:
            raise Draining(f"{self.name} is not taking requests")
        if hello.router in self._routers:
            self.post(RouterGone(hello.router))
        self._routers[hello.router] = link
        link.post(WorkerHello(self.member))
        link.post(Heartbeat(self.name, self.member.epoch, self.load))
        log.info("router connected", router=hello.router)
        return hello.router

    async def _health(self, request: web.Request) -> web.Response:
        return await self._ready(request)

    async def _ready(self, request: web.Request) -> web.Response:
        """200 when this worker can take work."""
        ready = self.member is not None and self.load.ready and not self._draining
        return web.json_response({"status": "ready" if ready else "not ready"}, status=200 if ready else 503)

    async def _live(self, request: web.Request) -> web.Response:
        """200 while this process answers; an engine process that dies ends it. Steps are not looked at yet."""
        return web.json_response({"status": "live"})

    async def _render_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=render(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE})

    async def _server_info(self, request: web.Request) -> web.Response:
        """What operators and other routers ask of a worker."""
        section = self.topology.prefill if self.role is Role.PREFILL else self.topology.decode
        body = {
            "worker": self.name,
            "model_path": self.topology.model.path,
            "served_model_name": self.topology.served_model,
            "tp_size": 1,
            "dp_size": 1,
            "disaggregation_mode": "null" if self.topology.unified else self.role.value,
            "max_running_requests": section.max_running,
            "member": self.member,
            "load": self.load,
        }
        return web.Response(body=msgspec.json.encode(body), content_type="application/json")

"""The control process of a worker, but for what its role adds: HTTP, the engine process, the links of its routers.

A role (`prefill_worker.control`, `decode_worker.control`) adds how it meets the peers of the other pool. Everything
here is relaying: no attempt's state lives in a control process.

The engine process is a child that may die, and is then started anew. All that is known of it under its epoch (member,
hello, links, registration) ends with it: one `_live` is one life.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec
from aiohttp import web
from yarl import URL

from cluster.access.security import ClusterSecurity
from cluster.clock import MonotonicClock
from cluster.config import Decode, Prefill, Topology
from cluster.engine_host import EngineHost
from cluster.engine_messages import EngineLoad, EngineReady, ProfileEnded, ProfileReply, ToPeer, ToRouter
from cluster.errors import BatonError, InvalidRequest, WorkerLost
from cluster.health_state import (
    LOOKS_PER_HEARTBEAT,
    Action,
    DrainAsked,
    EngineDied,
    EngineUp,
    GiveUp,
    HealthState,
    KillEngine,
    Looked,
    Stalled,
    StartEngine,
    Tell,
    WorkerHealth,
)
from cluster.http_server import HttpServer
from cluster.logging import get_logger
from cluster.memory_plan import MemoryUse
from cluster.messages import Load, Member, Message, PeerHello, Role
from cluster.metrics import CONTENT_TYPE, WorkerMetrics, render
from cluster.peers import PeerTable
from cluster.process import EXIT_DONE, EXIT_RESTART
from cluster.profiling import ProfileApi
from cluster.progress_board import Progress
from cluster.rank_hosts import RankHosts
from cluster.restarts import RestartBudget
from cluster.router_links import RouterLinks
from cluster.tasks import cancel, first_of, together

log = get_logger(__name__)

SLOWER_STARTS = 5
START_SLACK_SECONDS = 30.0
"""An engine process that replaces another may take so many times as long as the first one, and so many seconds more:
the machine may be busier now."""
SHUTDOWN_SECONDS = 1.0
"""For what is asked over HTTP at the end; attempts have ended before."""


class EngineCommand(NamedTuple):
    """How the engine process is started, see `EngineHost.start`."""

    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    ranks: int = 1
    """Processes that the model is spread over."""


class Membership(Protocol):
    """Bootstrap's knowledge of one life, see `bootstrap.client.Registration`."""

    async def run(self) -> None:
        """Until `leave`, or until cancelled. Raises if this worker is refused."""

    async def leave(self, reason: str) -> None: ...


Join = Callable[[Member], Membership]


class DrainRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /drain`; may be empty."""

    restart: bool = False
    """End with the exit code that asks whoever started this process to start it anew."""


class WorkerShell:
    """One worker's HTTP server and engine process. `listen`, then `run`; `close` in any case."""

    def __init__(self, name: str, role: Role, topology: Topology, command: EngineCommand) -> None:
        self.name = name
        self.role = role
        self.topology = topology
        self.exit_code = EXIT_DONE
        """What the process should end with, after `run` has ended without an error."""
        self.security = ClusterSecurity(topology.security)
        self.metrics = WorkerMetrics(name, role)
        self._clock = MonotonicClock()
        self._hosts = RankHosts(self._section.nodes, self.ask_drain, self._clock) if self._section.nodes > 1 else None
        self.peers = PeerTable(self.post, self.metrics.peers, self._hosts)
        self.app = web.Application()
        self._command = command
        self._budget = RestartBudget(topology.restarts)
        self._health = WorkerHealth(
            name,
            topology.bootstrap.heartbeat_seconds,
            topology.worker.stall_limit_seconds,
            topology.kv.write_timeout_seconds,
            self._budget,
        )
        self._routers = RouterLinks(name, role, self.post, self.load, self.metrics, self._clock)
        self._engine: EngineHost | None = None
        self._membership: Membership | None = None
        self._belonging: asyncio.Future[None] | None = None
        """Its `run`, which outlives all else of a life: it has yet to say goodbye."""
        self._member: Member | None = None
        self._memory: MemoryUse | None = None
        """As it was when the engine process was ready."""
        self._ending: asyncio.Future[None] | None = None
        """The end of the last life, once it has begun."""
        self._first_start: float | None = None
        """Seconds that the first engine process took to be ready."""
        self._reported = Load()
        """By the engine process."""
        self._drain_asked = asyncio.Event()
        self._url = ""
        self._profiles = ProfileApi(name, topology.logging.profile_dir, self.post, lambda: self._member is not None)
        self.security.guard(self.app, self.metrics.unauthorized)
        self._server = HttpServer(self.app, SHUTDOWN_SECONDS, self.security.server_tls)
        self._add_routes()

    def _add_routes(self) -> None:
        router = self.app.router
        router.add_get("/health", self._ready)
        router.add_get("/ready", self._ready)
        router.add_get("/live", self._is_live)
        router.add_get("/metrics", self._render_metrics)
        router.add_get("/server_info", self._server_info)
        router.add_get("/router", self._routers.serve)
        router.add_post("/drain", self._drain)
        self._profiles.add_routes(self.app)
        if self._hosts is not None:
            router.add_get("/ranks", self._hosts.serve)

    @property
    def _section(self) -> Prefill | Decode:
        return self.topology.prefill if self.role is Role.PREFILL else self.topology.decode

    # --- for the role ------------------------------------------------------------------------------------------------

    async def listen(self, host: str, port: int, address: str | None = None) -> None:
        """On `address`, by default `host`, which is what the others are told. Raises `ConfigError` if it can't, or may
        not."""
        address = address or host
        self.security.require_for(address, f"{self.role.value}.host")
        url = await self._server.start(address, port, "choose another port")
        self._url = str(URL(url).with_host(host))
        if self._hosts is not None:
            self._hosts.listen_at(host, address)

    async def run(self, join: Join) -> None:
        """Works until it is drained. `join` makes a life's membership. Raises what the engine process could not start
        with, `WorkerLost` when it has died too often, and what bootstrap refuses this worker with."""
        await first_of(asyncio.ensure_future(self._lives(join)), asyncio.ensure_future(self._leave_when_asked()))

    def ask_drain(self) -> None:
        """Leads to the end of `run`: no new work, and what is under way finishes, or goes back to its routers."""
        self._drain_asked.set()

    def post(self, message: Message) -> None:
        """To the engine process; while there is none, to nobody."""
        if self._engine is not None:
            self._engine.post(message)

    async def close(self) -> None:
        """When this returns there is no engine process any more."""
        if self._ending is not None:
            await self._ending
        if self._hosts is not None:
            await self._hosts.close()
        await self._server.stop()

    # --- lives of the engine process ---------------------------------------------------------------------------------

    async def _lives(self, join: Join) -> None:
        """One after the other."""
        while True:
            death, actions = await self._live(join)
            for action in actions:
                if isinstance(action, GiveUp):
                    raise death if self._budget.restarts == 0 else WorkerLost(f"{death}; {action.verdict}")
                if isinstance(action, StartEngine):
                    self.metrics.engine_restarted(action.cause.value)
                    log.info("starting the engine process anew", seconds=action.after_seconds)
                    await asyncio.sleep(action.after_seconds)
            if not actions:
                return

    async def _live(self, join: Join) -> tuple[BatonError, list[Action]]:
        """One life; returns what it ended with, and what is to be done about it. Raises what bootstrap refuses this
        worker with."""
        log.info("loading the model", model=self.topology.model.path, url=self._url)
        try:
            engine = self._engine = await self._start_engine()
        except BatonError as error:
            return error, self._died(error)
        try:
            try:
                ready = await self._started(engine)
            except BatonError as error:
                return error, self._died(error)
            self._membership = join(self._begin(ready))
            death = await self._work(engine, self._membership)
            return death, self._died(death)
        finally:
            # Whoever cancels us now must not cut it short: `close` waits for the rest.
            self._ending = asyncio.ensure_future(self._end(engine))
            await asyncio.shield(self._ending)

    async def _start_engine(self) -> EngineHost:
        """Raises `WorkerLost` if a further host of this worker is lost meanwhile."""
        if self._hosts is None:
            return await EngineHost.start(*self._command)
        return await EngineHost.start_spread(*self._command, self._hosts)

    def _died(self, death: BatonError) -> list[Action]:
        if self._health.state is not HealthState.DRAINING:
            log.error("the engine process ended", error=str(death), kind=type(death).__name__)
        return self._health.handle(EngineDied(str(death)), self._clock.now())

    async def _started(self, engine: EngineHost) -> EngineReady:
        """Raises what it could not start with, or that it hangs: the first start shows how long one takes."""
        begun = self._clock.now()
        limit = None if self._first_start is None else SLOWER_STARTS * self._first_start + START_SLACK_SECONDS
        try:
            ready = await asyncio.wait_for(engine.ready(), limit)
        except asyncio.TimeoutError:
            raise WorkerLost(f"the new engine process was not ready after {limit:.0f} s") from None
        self._first_start = self._first_start or self._clock.now() - begun
        return ready

    async def _work(self, engine: EngineHost, membership: Membership) -> BatonError:
        relaying = asyncio.ensure_future(self._relay(engine))
        self._belonging = belonging = asyncio.ensure_future(membership.run())

        async def not_refused() -> None:
            await asyncio.shield(belonging)

        beside = asyncio.ensure_future(together(not_refused(), self._look(engine), self._beat()))
        try:
            await asyncio.wait({relaying, beside}, return_when=asyncio.FIRST_COMPLETED)
            if beside.done():
                beside.result()
            return await relaying
        finally:
            await cancel(relaying, beside)

    def _begin(self, ready: EngineReady) -> Member:
        section = self._section
        member = self._member = Member(
            worker=self.name,
            role=self.role,
            epoch=ready.epoch,
            url=self._url,
            layout=ready.layout,
            model=ready.model,
            transfer=self.topology.kv.transfer.value,
            pool_pages=ready.pool_pages,
            max_running=section.max_running,
            speed=ready.speed,
        )
        self._memory = ready.memory
        self._reported = Load(pages_total=ready.pool_pages)
        hello = PeerHello(
            worker=self.name,
            role=self.role,
            epoch=ready.epoch,
            layout=ready.layout,
            transfer=member.transfer,
            descriptor=ready.descriptor,
            engine=ready.process,
            followers=ready.followers,
        )
        self._routers.open(member)
        self.peers.open(hello)
        self._handle(EngineUp())
        memory = {} if ready.memory is None else msgspec.structs.asdict(ready.memory)
        log.info(
            "engine ready", epoch=ready.epoch, pages=ready.pool_pages, layout=ready.layout.fingerprint, memory=memory
        )
        return member

    async def _end(self, engine: EngineHost) -> None:
        """Routers and bootstrap learn of the end at once; peers when the process is dead for certain."""
        self._member, membership, self._membership = None, self._membership, None
        belonging, self._belonging = self._belonging, None
        self.metrics.engine_gone()
        self._profiles.engine_gone()
        leaving = [] if membership is None else [membership.leave("its engine process ended")]
        await asyncio.gather(self._routers.close(), *leaving)
        if belonging is not None:
            await cancel(belonging)
        self._engine = None
        await engine.close()
        await self.peers.close()

    async def _relay(self, engine: EngineHost) -> BatonError:
        """From the engine process to whom it concerns, until its end; returns how it ended."""
        while True:
            try:
                messages = await engine.receive()
            except BatonError as death:
                return death
            for message in messages:
                if isinstance(message, ToRouter):
                    self._routers.deliver(message)
                elif isinstance(message, ToPeer):
                    self.peers.send(message)
                elif isinstance(message, EngineLoad):
                    self._reported = message.load
                    self.metrics.observe_load(message.load)
                elif isinstance(message, ProfileReply):
                    self._profiles.answer(message)
                elif isinstance(message, ProfileEnded):
                    log.info("profile written", file=message.file)

    # --- health ------------------------------------------------------------------------------------------------------

    def load(self) -> Load:
        """What a heartbeat says: the engine process's own words, and what is seen of it."""
        progress = self._progress()
        oldest = progress.oldest_transfer
        return msgspec.structs.replace(
            self._reported,
            ready=self._reported.ready and self._health.ready,
            progress=progress.engine,
            oldest_transfer_seconds=0.0 if oldest is None else max(0.0, self._clock.now() - oldest),
            stalled=self._health.stalled or self._reported.stalled,
            draining=self._health.state is HealthState.DRAINING or self._reported.draining,
        )

    def _progress(self) -> Progress:
        return Progress() if self._engine is None else self._engine.board.read()

    async def _beat(self) -> None:
        while True:
            self._routers.beat()
            self.metrics.observe_oldest_transfer(self.load().oldest_transfer_seconds)
            await asyncio.sleep(self.topology.bootstrap.heartbeat_seconds)

    async def _look(self, engine: EngineHost) -> None:
        while True:
            for action in self._handle(Looked(engine.board.read())):
                if isinstance(action, Stalled):
                    log.warning("stalled", reason=action.reason)
                    self.metrics.stalled(action.part.value)
                elif isinstance(action, KillEngine):
                    log.error("the engine process is killed", error=action.reason)
                    engine.kill()
            await asyncio.sleep(self.topology.bootstrap.heartbeat_seconds / LOOKS_PER_HEARTBEAT)

    def _handle(self, event: object) -> list[Action]:
        """Gives the event to the worker's health; what it wants told is told here."""
        actions = self._health.handle(event, self._clock.now())
        if any(isinstance(action, Tell) for action in actions):
            self.metrics.observe_ready(ready=self._health.ready)
            log.info("health", state=self._health.state.value, reason=self._health.reason)
            self._routers.beat()
        return actions

    async def _leave_when_asked(self) -> None:
        await self._drain_asked.wait()
        self._handle(DrainAsked())
        if self._membership is not None:
            await self._membership.leave("draining")
        await self._routers.drain(self.topology.worker.drain_seconds)
        log.info("drained")

    # --- HTTP --------------------------------------------------------------------------------------------------------

    async def _ready(self, request: web.Request) -> web.Response:
        """200 when this worker can take work; else why it can't."""
        load = self.load()
        if load.ready:
            return _status(200, "ready")
        return _status(503, "not ready", self._health.reason or load.stalled)

    async def _is_live(self, request: web.Request) -> web.Response:
        """200 unless the engine process has hung for so long that only an end from outside can help."""
        if self._health.live:
            return _status(200, "live")
        return _status(503, "not live", self._health.reason)

    async def _drain(self, request: web.Request) -> web.Response:
        """Returns at once; the process ends when it has drained."""
        try:
            wanted = msgspec.json.decode(await request.read() or b"{}", type=DrainRequest)
        except msgspec.DecodeError as error:
            refusal = InvalidRequest(f"the body: {error}").to_info()
            return _json({"error": refusal}, InvalidRequest.status)
        if wanted.restart:
            self.exit_code = EXIT_RESTART
        self.ask_drain()
        return _json({"worker": self.name, "drain_seconds": self.topology.worker.drain_seconds}, 202)

    async def _render_metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=render(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE})

    async def _server_info(self, request: web.Request) -> web.Response:
        """What operators and other routers ask of a worker."""
        section = self._section
        return _json(
            {
                "worker": self.name,
                "model_path": self.topology.model.path,
                "served_model_name": self.topology.served_model,
                "tp_size": section.tensor_parallel,
                "pp_size": section.pipeline_parallel,
                "dp_size": 1,
                "disaggregation_mode": "null" if self.topology.unified else self.role.value,
                "max_running_requests": section.max_running,
                "member": self._member,
                "memory": self._memory,
                "load": self.load(),
            }
        )


def _status(code: int, status: str, reason: str = "") -> web.Response:
    return _json({"status": status, **({"reason": reason} if reason else {})}, code)


def _json(body: object, code: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=code, content_type="application/json")

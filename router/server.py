"""The router process: makes its parts, serves until told to stop, and lets requests under way finish first."""

from __future__ import annotations

import asyncio
import secrets
import time

import aiohttp

from cluster.access.security import ClusterSecurity, open_api_keys
from cluster.access.tls import server_context
from cluster.clock import Clock, MonotonicClock
from cluster.config import Topology
from cluster.http_server import HttpServer, PortLimits
from cluster.logging import get_logger
from cluster.metrics import RouterMetrics
from cluster.model_files import resolve_model
from cluster.process import forget_garbage
from cluster.server_process import run_until_stopped
from cluster.tasks import first_of
from router.admission import AdmissionQueue
from router.api.admitting import Admission
from router.api.app import build_app
from router.api.generation import GenerationApi
from router.api.operations import OperationsApi
from router.api.plan import Planner
from router.break_even import BreakEvenPolicy
from router.dispatch import Dispatcher
from router.drain import Drain
from router.fleet import Fleet
from router.fleet_view import FleetView
from router.policies import POLICIES, Policy
from router.records import RecordStore
from router.text.model_text import ModelText, load_model_text

log = get_logger(__name__)

SHUTDOWN_SECONDS = 1.0
"""For the last bytes of answers that were cut off at the end of a drain."""


class RouterServer:
    """All parts of one router, wired. `start`, then `run`; `stop` in any case."""

    def __init__(
        self, topology: Topology, text: ModelText, session: aiohttp.ClientSession, clock: Clock | None = None
    ) -> None:
        self._topology = topology
        config, unified = topology.router, topology.unified
        clock = clock or MonotonicClock()
        self.router_id = f"router-{secrets.token_hex(4)}"
        self.metrics = RouterMetrics()
        self.fleet = Fleet(
            session,
            topology.bootstrap_url,
            self.router_id,
            FleetView(topology.bootstrap.lease_seconds, unified=unified),
            _policy(topology),
            clock,
            self.metrics,
        )
        records = RecordStore()
        self.dispatcher = Dispatcher(self.fleet, records, self.metrics, clock, config.recovery)
        self.fleet.listen(self.dispatcher)
        planner = Planner(topology.served_model, text, config, self.fleet.limits, clock, self.metrics)
        scheduling = topology.decode.scheduling if unified else topology.prefill.scheduling
        admission = Admission(AdmissionQueue(config.limits, scheduling.policy), self.metrics, clock)
        self._generation = GenerationApi(planner, self.dispatcher, text.table, self.metrics, clock, admission, config)
        operations = OperationsApi(
            self.router_id,
            int(time.time()),
            unified,
            planner,
            self._generation,
            self.dispatcher,
            self.fleet,
            admission,
            records,
            self.metrics,
        )
        keys = open_api_keys(config, topology.security, clock)
        self.application = build_app(self._generation, operations, self.metrics, config, keys)
        self._drain = Drain()
        self._drain.watch(self.application)
        limits = config.limits
        self._server = HttpServer(
            self.application,
            SHUTDOWN_SECONDS,
            server_context(config.tls, "router.tls"),
            PortLimits(limits.connections, limits.header_bytes, limits.idle_seconds),
            handler_cancellation=True,
        )

    async def start(self) -> str:
        """Listens; returns the URL. Raises `ConfigError` if it can't."""
        config = self._topology.router
        url = await self._server.start(config.host, config.port, "set router.port to a free one")
        log.info("listening", url=url, model=self._topology.served_model, router=self.router_id)
        return url

    @property
    def connections(self) -> int:
        """Open, of clients."""
        return self._server.connections

    async def run(self) -> None:
        """Follows the fleet until it is cancelled, or drained."""
        drained = self._drain.done(self._topology.router.drain_seconds)
        await first_of(asyncio.ensure_future(self.fleet.run()), asyncio.ensure_future(drained))

    def ask_drain(self) -> None:
        """Refuses new requests, and leads to the end of `run` when those under way have ended, or have had their
        time."""
        self._generation.draining = True
        self._drain.ask()
        log.info("draining", in_flight=self.dispatcher.in_flight)

    async def stop(self) -> None:
        """Closes the port and all links; what is under way is cut off."""
        self._generation.draining = True
        await self._server.stop()
        await self.fleet.close()


def _policy(topology: Topology) -> Policy:
    config = topology.router
    pairs = POLICIES[config.policy]
    if not config.break_even.enabled:
        return pairs
    return BreakEvenPolicy(pairs, config.break_even, topology.prefill.scheduling.policy)


async def serve(topology: Topology) -> None:
    """Serves until SIGTERM or SIGINT, and then drains. Raises `ConfigError` if the router can't start."""
    text = await asyncio.to_thread(load_model_text, resolve_model(topology.model.path))
    async with ClusterSecurity(topology.security).session() as session:
        server = RouterServer(topology, text, session)
        try:
            await server.start()
            forget_garbage()
            await run_until_stopped(asyncio.create_task(server.run()), leave=server.ask_drain)
        finally:
            await server.stop()

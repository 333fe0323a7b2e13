"""The bootstrap service: a WebSocket for members, one for watchers, and plain HTTP for people and probes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry
from yarl import URL

from bootstrap.roster_state import Announce, RosterState
from cluster.clock import Clock
from cluster.config import Bootstrap
from cluster.errors import ProtocolError, StaleFence, UnknownMessage
from cluster.layout import SCHEMA_VERSION
from cluster.links import Link, LinkClosed, accept
from cluster.logging import get_logger
from cluster.messages import Heartbeat, Joined, Leave, Left, Member, Refused, Register, Registered, Watch
from cluster.metrics import CONTENT_TYPE, BootstrapMetrics, render

log = get_logger(__name__)


class BootstrapServer:
    """Carries messages between the network and a `RosterState`; owns the links, decides nothing."""

    def __init__(self, config: Bootstrap, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._state = RosterState(config.lease_seconds)
        self._watchers: set[Link] = set()
        self._metrics = BootstrapMetrics()

    @property
    def registry(self) -> CollectorRegistry:
        return self._metrics.registry

    def unauthorized(self, reason: str) -> None:
        """Counts a request that has not proven the cluster's secret."""
        self._metrics.unauthorized(reason)

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/members", self._members)
        app.router.add_get("/watch", self._watch)
        app.router.add_get("/workers", self._workers)
        for probe in ("/health", "/ready", "/live"):
            app.router.add_get(probe, self._health)
        app.router.add_get("/metrics", self._render_metrics)
        app.router.add_get("/targets", self._targets)
        app.cleanup_ctx.append(self._ticking)
        return app

    async def _members(self, request: web.Request) -> web.StreamResponse:
        """One worker's link. Its end is no leave: the lease decides."""
        link = await accept(request)
        member: Member | None = None
        try:
            while True:
                message = await link.receive()
                now = self._clock.now()
                if isinstance(message, Register):
                    self._require_version(message.version)
                    self._announce(self._state.register(message, now))
                    member = message.member
                    link.post(Registered(self._config.heartbeat_seconds, self._config.lease_seconds))
                elif isinstance(message, Heartbeat | Leave):
                    self._require_own(message, member)
                    self._announce(self._state.handle(message, now))
                else:
                    raise UnknownMessage(f"{type(message).__name__} does not belong on a member's link")
        except LinkClosed:
            log.debug("member's link closed", worker=member.worker if member else None)
        except ProtocolError as error:
            log.warning("refused", worker=member.worker if member else None, error=str(error))
            link.post(Refused(error.to_info()))
        finally:
            await link.close()
        return web.Response()

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        link = await accept(request)
        try:
            message = await link.receive()
            if not isinstance(message, Watch):
                raise UnknownMessage(f"{type(message).__name__} does not begin a watch")
            self._require_version(message.version)
            link.post(self._state.roster(self._clock.now()))
            self._watchers.add(link)
            while True:
                await link.receive()
        except LinkClosed:
            pass
        except ProtocolError as error:
            log.warning("refused a watcher", error=str(error))
            link.post(Refused(error.to_info()))
        finally:
            self._watchers.discard(link)
            await link.close()
        return web.Response()

    async def _workers(self, request: web.Request) -> web.Response:
        roster = self._state.roster(self._clock.now())
        return web.Response(body=msgspec.json.encode({"workers": roster.members}), content_type="application/json")

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _render_metrics(self, request: web.Request) -> web.Response:
        roster = self._state.roster(self._clock.now())
        self._metrics.observe(roster.members, len(self._watchers))
        return web.Response(body=render(self.registry), headers={"Content-Type": CONTENT_TYPE})

    async def _targets(self, request: web.Request) -> web.Response:
        """The workers, in the words of Prometheus' HTTP service discovery: who is gone is scraped no more."""
        members = [status.member for status in self._state.roster(self._clock.now()).members]
        found = [(member, URL(member.url)) for member in members]
        return web.json_response(
            [
                {
                    "targets": [url.authority],
                    "labels": {
                        "__scheme__": url.scheme,
                        "__meta_baton_worker": member.worker,
                        "__meta_baton_role": member.role.value,
                    },
                }
                for member, url in found
            ]
        )

    async def _ticking(self, app: web.Application) -> AsyncIterator[None]:
        interval = self._config.heartbeat_seconds / 4

        async def tick() -> None:
            due = self._clock.now()
            while True:
                now = self._clock.now()
                if now - due > interval:
                    log.warning("bootstrap was stuck", seconds=round(now - due, 3))
                    self._state.slept(now - due)
                self._announce(self._state.tick(now), silent=True)
                due = now + interval
                await asyncio.sleep(interval)

        task = asyncio.create_task(tick())
        yield
        task.cancel()
        await asyncio.gather(task, *(link.close() for link in self._watchers), return_exceptions=True)

    def _announce(self, announces: Iterable[Announce], *, silent: bool = False) -> None:
        """`silent`: nobody said so, time did."""
        for announce in announces:
            message = announce.message
            if isinstance(message, Joined):
                log.info("joined", worker=message.member.worker, epoch=message.member.epoch, url=message.member.url)
                self._metrics.joined()
            elif isinstance(message, Left):
                log.warning("left", worker=message.worker, epoch=message.epoch, reason=message.reason)
                self._metrics.left(silent=silent)
            for link in self._watchers:
                link.post(message)

    @staticmethod
    def _require_own(message: Heartbeat | Leave, member: Member | None) -> None:
        """A link speaks for the member that registered on it, and for no other."""
        if member is None or (message.worker, message.epoch) != (member.worker, member.epoch):
            found = f"{message.worker} of epoch {message.epoch}"
            registered = "nobody" if member is None else f"{member.worker} of epoch {member.epoch}"
            raise StaleFence(f"this link is for {registered}, not for {found}")

    @staticmethod
    def _require_version(version: int) -> None:
        if version != SCHEMA_VERSION:
            raise UnknownMessage(f"schema version {version} is not ours ({SCHEMA_VERSION}): update the older side")

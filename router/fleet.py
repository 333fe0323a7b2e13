"""The shell around `FleetView`: follows the roster and keeps one link to each worker in it."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress
from typing import Protocol

import aiohttp

from bootstrap.client import RosterWatcher
from cluster.clock import Clock
from cluster.errors import (
    BatonError,
    NoWorker,
    PromptTooLong,
    ProtocolError,
    StaleFence,
    UnknownMessage,
    from_info,
)
from cluster.links import Backoff, Link, LinkClosed, dial
from cluster.logging import get_logger
from cluster.messages import AnyMessage, Fence, Heartbeat, Member, Message, Refused, Role, RouterHello, WorkerHello
from cluster.metrics import RouterMetrics, SeenWorker
from router.breakers import Leg
from router.fleet_view import FleetLimits, FleetView, Stall, WorkerStatus
from router.hints import NO_HINTS, Hints, narrowed
from router.policies import Need, Placement, Policy, Snapshot, compatible_groups
from router.request_state import WorkerKey

log = get_logger(__name__)

HELLO_SECONDS = 5.0
"""A worker that accepts the connection and says nothing for so long is tried again."""

STALL_CHECK_SECONDS = 0.1
"""How often silent workers are looked for."""
SERVED_CHECK_SECONDS = 1.0
"""How often it is noted that a request could be placed, while none comes."""
STUCK_SECONDS = 0.5
"""A look that is late by so much says that the router itself had no time to hear anybody."""

ANY_REQUEST = Need(prompt=1, output=2)
"""The smallest request that takes both legs."""


class WorkerEvents(Protocol):
    """Who hears from the workers; called on the event loop, must not raise."""

    def receive(self, key: WorkerKey, message: AnyMessage) -> None: ...

    def worker_lost(self, key: WorkerKey, reason: str) -> None:
        """Nothing more comes from this link; a worker that is still alive has cancelled our attempts."""

    def worker_stalled(self, key: WorkerKey, stall: Stall) -> None:
        """The link stands, but our attempts there don't get on. Told again and again while there are any."""


class Fleet:
    """Owns the links. `run` until the end, then `close`. When bootstrap goes away, what is known stays in use."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        bootstrap_url: str,
        router_id: str,
        view: FleetView,
        policy: Policy,
        clock: Clock,
        metrics: RouterMetrics,
    ) -> None:
        self._session = session
        self._router_id = router_id
        self._view = view
        self._policy = policy
        self._clock = clock
        self._metrics = metrics
        self._roster = RosterWatcher(session, bootstrap_url, router_id, self._on_change)
        self._links: dict[WorkerKey, Link] = {}
        self._keepers: dict[WorkerKey, asyncio.Task[None]] = {}
        self._events: WorkerEvents | None = None
        self._turn = 0
        self._served_at = float("-inf")
        """When there last was a place."""
        self._defect: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def listen(self, events: WorkerEvents) -> None:
        """Names the one who hears from the workers; once, before `run`."""
        self._events = events

    async def run(self) -> None:
        """Runs until cancelled. Raises what a link's task died of: that can only be a defect."""
        tasks = [asyncio.create_task(self._roster.run()), asyncio.create_task(self._watch())]
        try:
            done, _ = await asyncio.wait({*tasks, self._defect}, return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        for task in self._keepers.values():
            task.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)

    # --- for the dispatcher ------------------------------------------------------------------------------------------

    def require(self, need: Need = ANY_REQUEST) -> None:
        """Raises what `place` would raise: `NoWorker` or `PromptTooLong`."""
        compatible_groups(self._view.snapshot(self._clock.now()), need)

    def place(self, need: Need, hints: Hints = NO_HINTS) -> Placement:
        """Follows the hints where they leave a place. Raises `NoWorker` or `PromptTooLong`."""
        now = self._clock.now()
        placement = self._choose(self._view.snapshot(now), need, hints)
        self._served_at = now
        self._metrics.placement.observe(self._clock.now() - now)
        legs = "decode" if placement.prefill is None else "prefill" if placement.decode is None else "pair"
        self._metrics.placements.labels(legs=legs).inc()
        return placement

    def _choose(self, snapshot: Snapshot, need: Need, hints: Hints) -> Placement:
        turn, self._turn = self._turn, self._turn + 1
        if hints != NO_HINTS:
            try:
                return self._policy.place(narrowed(snapshot, hints), need, turn)
            except (NoWorker, PromptTooLong):
                log.debug("no place by the hints", hints=str(hints))
        return self._policy.place(snapshot, need, turn)

    def absent_seconds(self) -> float:
        """How long ago a request was, or could have been, placed; infinite if that never was so."""
        return self._clock.now() - self._served_at

    def post(self, key: WorkerKey, message: Message) -> None:
        """To a worker that may just be gone: then `worker_lost` has told, or will tell."""
        link = self._links.get(key)
        if link is not None:
            link.post(message)

    def commit(self, key: WorkerKey, fence: Fence, need: Need, *, prefills: bool) -> None:
        self._view.commit(key, fence, need.prompt, need.output, prefills=prefills)

    def prefilled(self, key: WorkerKey, fence: Fence) -> None:
        self._view.prefilled(key, fence)

    def release(self, key: WorkerKey, fence: Fence) -> None:
        self._view.release(key, fence)

    # --- for the API -------------------------------------------------------------------------------------------------

    def limits(self) -> FleetLimits | None:
        return self._view.limits(self._clock.now())

    def statuses(self) -> list[WorkerStatus]:
        return self._view.statuses(self._clock.now())

    def integrity_errors(self) -> list[str]:
        return self._view.integrity_errors()

    def observe(self, shut: Collection[Leg]) -> None:
        """Brings the gauges up to date. `shut`: those whose breaker is open."""
        self._metrics.observe_workers(
            SeenWorker(
                worker=status.worker,
                role=status.role,
                attempts=status.attempts,
                heartbeat_age_seconds=status.heartbeat_age_seconds,
                shut_out=(status.worker, status.role) in shut,
            )
            for status in self.statuses()
        )
        snapshot = self._view.snapshot(self._clock.now())
        self._metrics.workers.labels(role=Role.PREFILL.value).set(len(snapshot.prefill))
        self._metrics.workers.labels(role=Role.DECODE.value).set(len(snapshot.decode))

    async def _watch(self) -> None:
        """Tells of workers that stall. A worker that dies tells by its connection."""
        due = self._clock.now() + STALL_CHECK_SECONDS
        while True:
            if self.absent_seconds() > SERVED_CHECK_SECONDS:
                with suppress(NoWorker):
                    self.require()
                    self._served_at = self._clock.now()
            await asyncio.sleep(STALL_CHECK_SECONDS)
            now = self._clock.now()
            if now - due > STUCK_SECONDS:
                log.warning("the router was stuck", seconds=round(now - due, 3))
                self._view.slept(now - due)
            due = now + STALL_CHECK_SECONDS
            for key, stall in self._view.stalled(now).items():
                if self._events is not None:
                    self._events.worker_stalled(key, stall)

    # --- links -------------------------------------------------------------------------------------------------------

    def _on_change(self, joined: list[Member], left: list[Member]) -> None:
        for member in left:
            key = WorkerKey(member.worker, member.epoch)
            self._view.left(key)
            if key not in self._links and key in self._keepers:
                self._keepers.pop(key).cancel()
                self._view.gone(key)
        for member in joined:
            key = self._view.joined(member)
            if key not in self._keepers:
                keeper = asyncio.create_task(self._keep(key, member), name=f"worker {member.worker}")
                keeper.add_done_callback(self._keeper_ended)
                self._keepers[key] = keeper

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        defect = None if keeper.cancelled() else keeper.exception()
        if defect is not None and not self._defect.done():
            self._defect.set_exception(defect)

    async def _keep(self, key: WorkerKey, member: Member) -> None:
        """Connects again and again, until the worker has left and its link is down."""
        backoff = Backoff()
        while not self._view.is_leaving(key):
            try:
                await self._connect(key, member, backoff)
            except LinkClosed as closed:
                log.debug("worker is away", worker=member.worker, epoch=member.epoch, reason=str(closed))
            except BatonError as error:
                log.warning("worker refused", worker=member.worker, epoch=member.epoch, error=str(error))
            if not self._view.is_leaving(key):
                await asyncio.sleep(backoff.next())
        del self._keepers[key]
        self._view.gone(key)
        log.info("worker gone", worker=member.worker, epoch=member.epoch)

    async def _connect(self, key: WorkerKey, member: Member, backoff: Backoff) -> None:
        """Serves one connection to its end, which it raises."""
        link = await dial(self._session, f"{member.url}/router")
        reason = "the router is stopping"
        try:
            link.post(RouterHello(self._router_id, member.epoch))
            await self._expect_hello(link, member)
            backoff.reset()
            self._links[key] = link
            self._view.linked(key, self._clock.now())
            log.info("worker linked", worker=member.worker, role=member.role.value, epoch=member.epoch, url=member.url)
            while True:
                self._route(key, await link.receive())
        except (LinkClosed, ProtocolError) as error:
            reason = str(error)
            raise
        finally:
            if self._links.get(key) is link:
                del self._links[key]
                self._view.unlinked(key)
                log.warning("worker lost", worker=member.worker, epoch=member.epoch, reason=reason)
                if self._events is not None:
                    self._events.worker_lost(key, reason)
            await link.close()

    @staticmethod
    async def _expect_hello(link: Link, member: Member) -> None:
        try:
            hello = await asyncio.wait_for(link.receive(), HELLO_SECONDS)
        except asyncio.TimeoutError:
            raise LinkClosed(f"{member.worker} did not answer within {HELLO_SECONDS:g} s") from None
        if isinstance(hello, Refused):
            raise from_info(hello.error)
        if not isinstance(hello, WorkerHello):
            raise UnknownMessage(f"expected WorkerHello, got {type(hello).__name__}")
        if (hello.member.worker, hello.member.epoch) != (member.worker, member.epoch):
            found = f"{hello.member.worker} of epoch {hello.member.epoch}"
            raise StaleFence(f"at {member.url} is {found}, bootstrap says {member.worker} of epoch {member.epoch}")

    def _route(self, key: WorkerKey, message: AnyMessage) -> None:
        if isinstance(message, Heartbeat):
            # Each speaks for itself: a heartbeat in another's name would make it dead, or alive.
            own = WorkerKey(message.worker, message.epoch) == key
            if not (own and self._view.heartbeat(message, self._clock.now())):
                self._metrics.stale.labels(kind="Heartbeat").inc()
        elif self._events is not None:
            self._events.receive(key, message)

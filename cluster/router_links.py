"""A worker's connections to its routers, as the control process sees them: attempts in, tokens out, heartbeats beside.

It knows which attempts are under way, and whose they are, but nothing of their state: so that a worker that leaves can
wait for them, and give back what does not finish in time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping

from aiohttp import web

from cluster.clock import Clock
from cluster.engine_messages import FromRouter, RouterGone, ToRouter
from cluster.errors import Draining, ProtocolError, StaleFence, UnknownMessage
from cluster.layout import SCHEMA_VERSION
from cluster.links import Link, LinkClosed, accept
from cluster.logging import get_logger
from cluster.messages import (
    AttemptFailed,
    AttemptFinished,
    CancelAttempt,
    DecodeAttempt,
    Fence,
    Heartbeat,
    Load,
    Member,
    Message,
    PrefillAttempt,
    Refused,
    Role,
    RouterHello,
    Tokens,
    WorkerHello,
)
from cluster.metrics import WorkerMetrics

log = get_logger(__name__)

ATTEMPT_TYPES: Mapping[Role, type[PrefillAttempt] | type[DecodeAttempt]] = {
    Role.PREFILL: PrefillAttempt,
    Role.DECODE: DecodeAttempt,
}
LAST_WORDS_SECONDS = 2.0
"""How long the engine process may take to end what was given back, so that its peers hear of it."""


class RouterLinks:
    """The routers of one worker. `post` gives a message to the engine process, `load` is what heartbeats say.

    Serves between `open` and `close`, which come with each life of the engine process.
    """

    def __init__(
        self,
        worker: str,
        role: Role,
        post: Callable[[Message], None],
        load: Callable[[], Load],
        metrics: WorkerMetrics,
        clock: Clock,
    ) -> None:
        self._worker = worker
        self._role = role
        self._post = post
        self._load = load
        self._metrics = metrics
        self._clock = clock
        self._member: Member | None = None
        self._draining = False
        self._links: dict[str, Link] = {}
        self._under_way: dict[Fence, str] = {}
        """The router of each attempt that has not had its last word."""
        self._given_back: set[Fence] = set()
        """Of them, those whose router has been told that it won't finish here."""
        self._idle = asyncio.Event()
        self._idle.set()

    # --- lives of the engine process ---------------------------------------------------------------------------------

    def open(self, member: Member) -> None:
        """An engine process is ready: this is how the worker introduces itself."""
        self._member = member

    async def close(self) -> None:
        """It is dead, or about to be: every router loses its link, and so learns of it now."""
        self._member = None
        links, self._links = list(self._links.values()), {}
        self._under_way.clear()
        self._given_back.clear()
        self._idle.set()
        await asyncio.gather(*(link.close() for link in links))

    async def drain(self, seconds: float) -> None:
        """Refuses new attempts, waits for those under way, and gives back what is left after `seconds`."""
        self._draining = True
        await self._wait_idle(seconds)
        for fence, router in list(self._under_way.items()):
            self._give_back(fence, router)
        await self._wait_idle(LAST_WORDS_SECONDS)

    def beat(self) -> None:
        if self._member is not None:
            beat = Heartbeat(self._worker, self._member.epoch, self._load())
            for link in self._links.values():
                link.post(beat)

    # --- from the engine process -------------------------------------------------------------------------------------

    def deliver(self, envelope: ToRouter) -> None:
        """To its router, if that is still connected."""
        message = envelope.message
        if isinstance(message, Tokens):
            self._metrics.observe_tokens(len(message.tokens))
        elif isinstance(message, AttemptFinished | AttemptFailed):
            self._observe_end(message)
            if self._ended(message.fence):
                return
        link = self._links.get(envelope.router)
        if link is not None:
            link.post(message)

    def _ended(self, fence: Fence) -> bool:
        """Notes an attempt's last word; True if its router has had one from us already."""
        self._under_way.pop(fence, None)
        if not self._under_way:
            self._idle.set()
        if fence not in self._given_back:
            return False
        self._given_back.remove(fence)
        return True

    def _observe_end(self, message: AttemptFinished | AttemptFailed) -> None:
        if isinstance(message, AttemptFailed):
            self._metrics.attempt_ended("failed")
            log.warning("attempt failed", request=message.fence.request, error=message.error.message)
            return
        self._metrics.attempt_ended(message.reason.value)
        for prefill in (message.prefill, message.decode.prefill if message.decode else None):
            if prefill is not None:
                self._metrics.observe_prefill(prefill)
        if message.handoff is not None:
            self._metrics.observe_handoff(message.handoff)
        if message.decode is not None:
            self._metrics.observe_decode(message.decode)
        log.info("attempt finished", request=message.fence.request, reason=message.reason.value)

    # --- from the routers --------------------------------------------------------------------------------------------

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """One router's link, to its end."""
        link = await accept(request)
        router: str | None = None
        try:
            hello = await link.receive()
            router = self._admit(hello, link)
            while True:
                self._take(router, link, await link.receive())
        except LinkClosed as closed:
            log.info("router disconnected", router=router, reason=str(closed))
        except (ProtocolError, Draining) as error:
            log.warning("refused a router", router=router, error=str(error))
            self._metrics.refused("router")
            link.post(Refused(error.to_info()))
        finally:
            if router is not None and self._links.get(router) is link:
                del self._links[router]
                self._post(RouterGone(router))
            await link.close()
        return web.Response()

    def _admit(self, hello: object, link: Link) -> str:
        if not isinstance(hello, RouterHello):
            raise UnknownMessage(f"expected RouterHello, got {type(hello).__name__}")
        if hello.version != SCHEMA_VERSION:
            raise UnknownMessage(
                f"schema version {hello.version} is not ours ({SCHEMA_VERSION}): update the older side"
            )
        if self._member is None or self._draining:
            raise Draining(f"{self._worker} is not taking requests")
        if hello.epoch not in (0, self._member.epoch):
            # A dial that was under way when we came back. It must not replace the connection that is meant for us.
            raise StaleFence(f"{self._worker} is of epoch {self._member.epoch} now, not {hello.epoch}")
        if hello.router in self._links:
            self._post(RouterGone(hello.router))
        self._links[hello.router] = link
        link.post(WorkerHello(self._member))
        link.post(Heartbeat(self._worker, self._member.epoch, self._load()))
        log.info("router connected", router=hello.router)
        return hello.router

    def _take(self, router: str, link: Link, message: object) -> None:
        if self._links.get(router) is not link:
            raise LinkClosed("the engine process that it was for has ended")
        if isinstance(message, ATTEMPT_TYPES[self._role]):
            if self._draining:
                link.post(self._refusal(message.fence))
                return
            self._under_way[message.fence] = router
            self._idle.clear()
        elif not isinstance(message, CancelAttempt):
            raise UnknownMessage(f"{type(message).__name__} is not for a {self._role.value} worker")
        log.debug("from router", kind=type(message).__name__, request=message.fence.request)
        self._post(FromRouter(router, message, self._clock.now()))

    # --- leaving -----------------------------------------------------------------------------------------------------

    async def _wait_idle(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)

    def _give_back(self, fence: Fence, router: str) -> None:
        """The router first: its next attempt need not wait for the end of this one. Nor may what peers say when this
        one is cancelled reach it before we do."""
        self._given_back.add(fence)
        self._metrics.attempt_ended("given_back")
        link = self._links.get(router)
        if link is not None:
            link.post(self._refusal(fence))
        self._post(FromRouter(router, CancelAttempt(fence, "the worker is draining"), self._clock.now()))

    def _refusal(self, fence: Fence) -> AttemptFailed:
        error = Draining(f"{self._worker} is leaving and does not finish this attempt")
        return AttemptFailed(fence, self._role, self._role, error.to_info())

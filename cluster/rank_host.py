"""What runs on each further host of a worker whose ranks are on several: starts ranks for the control process, which it
dials, and ends them.

It can't outlive anything: its ranks die with it, and when the link to the control process is lost it kills them and
dials again. So no half of a group goes on, whichever side is cut off. Of the kernel of this host it testifies to who is
dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import aiohttp
from aiohttp import web
from yarl import URL

from cluster import process_identity
from cluster.access.security import ClusterSecurity
from cluster.clock import Clock, MonotonicClock
from cluster.config import Topology
from cluster.engine_messages import EngineFailed, RankReady
from cluster.errors import BatonError, ErrorInfo, ProtocolError, UnknownMessage, from_info
from cluster.health_state import LOOKS_PER_HEARTBEAT
from cluster.http_server import HttpServer
from cluster.links import Backoff, Link, LinkClosed, dial
from cluster.logging import get_logger
from cluster.messages import DeathAsked, DeathWitnessed, Message, Refused
from cluster.process import EXIT_DONE
from cluster.rank_links import knock
from cluster.rank_messages import (
    EndRanks,
    HostLeaving,
    RankHostHello,
    RankMessage,
    RankOver,
    RankSeen,
    RanksSeen,
    RankUp,
    StartRanks,
    decode_rank_message,
)
from cluster.rank_process import LocalRank, place_arguments
from cluster.server_process import run_until_stopped
from cluster.tasks import cancel, first_of

log = get_logger(__name__)

SHUTDOWN_SECONDS = 1.0


class RankHost:
    """`run`, and `leave` to end it. `command` and `environment` are those of an engine process; `leader` is the URL of
    the worker's control process, and `node` this host's number, from 1."""

    def __init__(
        self,
        leader: str,
        node: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        look_seconds: float,
        clock: Clock,
    ) -> None:
        """`look_seconds`: between two reports of the ranks' progress."""
        self._leader = leader
        self._node = node
        self._command = command
        self._environment = environment
        self._look_seconds = look_seconds
        self._clock = clock
        self._link: Link | None = None
        self._group: asyncio.Task[None] | None = None
        self._leaving = False
        self._left = asyncio.Event()

    @property
    def linked(self) -> bool:
        return self._link is not None

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Until it has left. When it returns, and when it is cancelled, no rank is left."""
        await first_of(asyncio.ensure_future(self._keep_linked(session)), asyncio.ensure_future(self._wait_left()))

    def leave(self) -> None:
        """Has the worker drain; the end of its link is then ours. While there is no link, at once."""
        self._leaving = True
        if self._link is None:
            self._left.set()
        else:
            self._link.post(HostLeaving())

    async def _wait_left(self) -> None:
        await self._left.wait()

    async def _keep_linked(self, session: aiohttp.ClientSession) -> None:
        backoff = Backoff()
        while True:
            try:
                link = await dial(session, f"{self._leader}/ranks")
            except LinkClosed as error:
                log.debug("the worker's control process is away", reason=str(error))
            else:
                backoff.reset()
                await self._serve(link)
            await asyncio.sleep(backoff.next())

    async def _serve(self, link: Link) -> None:
        self._link = link
        log.info("linked to the worker's control process", leader=self._leader, node=self._node)
        link.post(RankHostHello(self._node))
        try:
            while True:
                await self._obey(decode_rank_message(await link.frame()), link)
        except (LinkClosed, ProtocolError) as error:
            log.warning("lost the worker's control process: ending its ranks", reason=str(error))
        finally:
            self._link = None
            await self._end_group()
            await link.close()
            if self._leaving:
                self._left.set()

    async def _obey(self, message: RankMessage, link: Link) -> None:
        """Raises `ProtocolError`."""
        if isinstance(message, StartRanks):
            await self._end_group()
            leader = URL(self._leader).host or ""
            group = _Group(message, leader, self._command, self._environment, link.post, self._clock)
            self._group = asyncio.create_task(group.run(self._look_seconds), name="ranks")
        elif isinstance(message, EndRanks):
            await self._end_group()
        elif isinstance(message, DeathAsked):
            if process_identity.is_dead(message.process):
                link.post(DeathWitnessed(message.process))
        elif isinstance(message, Refused):
            raise _as_protocol_error(message)
        else:
            raise UnknownMessage(f"{type(message).__name__} is not for a rank host")

    async def _end_group(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            await cancel(group)


class _Group:
    """The ranks of one life on this host."""

    def __init__(
        self,
        order: StartRanks,
        leader: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        post: Callable[[Message], None],
        clock: Clock,
    ) -> None:
        self._order = order
        self._leader = leader
        self._command = command
        self._environment = environment
        self._post = post
        self._clock = clock
        self._ranks: dict[int, LocalRank] = {}
        self._told: set[int] = set()
        """Ranks whose end was told."""

    async def run(self, look_seconds: float) -> None:
        """Starts them, and tells of all that becomes of them, until the last one's end. When it is cancelled, it kills
        them; when it is over, they are dead."""
        order = self._order
        reporting = asyncio.ensure_future(self._report(look_seconds))
        try:
            for number in range(order.first, order.first + order.count):
                self._ranks[number] = await self._start(number)
            await asyncio.gather(*(self._watch(number) for number in self._ranks))
        except (BatonError, OSError) as error:
            self._tell_none_started(error)
        finally:
            for rank in self._ranks.values():
                rank.kill()
            await cancel(reporting)
            for number, rank in self._ranks.items():
                await self._bury(number, rank)

    async def _start(self, number: int) -> LocalRank:
        """Raises `WorkerLost` if it can't be linked to rank 0."""
        order = self._order
        links = await knock(self._leader, order.links_port, order.token, number)
        try:
            for link in links:
                link.setblocking(True)
            descriptors = [link.fileno() for link in links]
            place = place_arguments(number, order.size, order.hosts, descriptors)
            meeting = ["--meet-at", self._leader, str(order.meeting_port)]
            return await LocalRank.start([*self._command, *place, *meeting], self._environment, descriptors)
        finally:
            for link in links:
                link.close()

    async def _watch(self, number: int) -> None:
        rank = self._ranks[number]
        error: ErrorInfo | None = None
        while messages := await rank.receive():
            for message in messages:
                if isinstance(message, RankReady):
                    self._post(RankUp(self._order.life, number, message.rank))
                elif isinstance(message, EngineFailed):
                    error = message.error
        await self._tell_end(number, rank, error)

    async def _report(self, look_seconds: float) -> None:
        while True:
            now = self._clock.now()
            seen = []
            for number, rank in self._ranks.items():
                progress = rank.board.read()
                begun = progress.oldest_transfer
                age = None if begun is None else max(0.0, now - begun)
                seen.append(RankSeen(number, progress.engine, progress.transfers, age))
            self._post(RanksSeen(self._order.life, seen))
            await asyncio.sleep(look_seconds)

    async def _bury(self, number: int, rank: LocalRank) -> None:
        await rank.end()
        if number not in self._told:
            await self._tell_end(number, rank, None)
        await rank.close()
        rank.board.close()

    async def _tell_end(self, number: int, rank: LocalRank, error: ErrorInfo | None) -> None:
        end = await rank.end()
        self._told.add(number)
        self._post(RankOver(self._order.life, number, end.words, end.well, error))

    def _tell_none_started(self, error: BatonError | OSError) -> None:
        """Of those that are not there."""
        info = error.to_info() if isinstance(error, BatonError) else BatonError(str(error)).to_info()
        for number in range(self._order.first, self._order.first + self._order.count):
            if number not in self._ranks:
                self._post(RankOver(self._order.life, number, "it could not be started", well=False, error=info))


async def serve_ranks(topology: Topology, host: RankHost, address: str, port: int) -> int:
    """Runs a rank host until it is asked to end, and its worker has drained. Returns its exit status. `address` and
    `port` are for its probes: it is live while it answers, and ready while it has its link. Raises `ConfigError`."""
    security = ClusterSecurity(topology.security)
    app = web.Application()

    async def ready(request: web.Request) -> web.Response:
        return web.Response(status=200 if host.linked else 503, text="linked" if host.linked else "no link to rank 0")

    async def live(request: web.Request) -> web.Response:
        return web.Response(text="live")

    app.router.add_get("/ready", ready)
    app.router.add_get("/live", live)
    security.guard(app, lambda reason: None)
    server = HttpServer(app, SHUTDOWN_SECONDS, security.server_tls)
    async with security.session() as session:
        try:
            await server.start(address, port, "choose another port")
            await run_until_stopped(asyncio.ensure_future(host.run(session)), leave=host.leave)
        finally:
            await server.stop()
    return EXIT_DONE


def make_rank_host(
    topology: Topology, leader: str, node: int, command: Sequence[str], environment: Mapping[str, str]
) -> RankHost:
    look_seconds = topology.bootstrap.heartbeat_seconds / LOOKS_PER_HEARTBEAT
    return RankHost(leader, node, command, environment, look_seconds, MonotonicClock())


def _as_protocol_error(refused: Refused) -> ProtocolError:
    error = from_info(refused.error)
    return error if isinstance(error, ProtocolError) else UnknownMessage(str(error))

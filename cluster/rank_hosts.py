"""The further hosts of a worker whose ranks are on several, as its control process sees them.

On each of them a rank host (`cluster.rank_host`) keeps a link to this process, and runs ranks when it is told to. While
one is missing no ranks can start; when one is lost, its ranks are over for us, and so is the group: the host, if it
lives, ends them as it loses the link. Whether they are dead for certain only its kernel knows, which is asked when the
host is back (`is_dead`); nobody is told so before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from cluster.clock import Clock
from cluster.engine_messages import EngineFailed, EngineMessage, RankReady
from cluster.errors import ErrorInfo, ProtocolError, UnknownMessage
from cluster.layout import SCHEMA_VERSION
from cluster.links import Link, LinkClosed, accept
from cluster.logging import get_logger
from cluster.messages import DeathAsked, DeathWitnessed, EngineRank, Message, ProcessIdentity, Refused
from cluster.progress_board import DistantBoard
from cluster.rank_links import RankDoor
from cluster.rank_messages import (
    EndRanks,
    HostLeaving,
    RankHostHello,
    RankMessage,
    RankOver,
    RanksSeen,
    RankUp,
    StartRanks,
    decode_rank_message,
)
from cluster.rank_process import End, RankProcess

log = get_logger(__name__)


class DistantRank:
    """Implements `RankProcess` for a rank on another host. `post` sends to that host."""

    def __init__(self, life: int, post: Callable[[Message], None]) -> None:
        self.board = DistantBoard()
        self._life = life
        self._send = post
        self._messages: asyncio.Queue[list[EngineMessage]] = asyncio.Queue()
        self._end: asyncio.Future[End] = asyncio.get_running_loop().create_future()

    def is_up(self, rank: EngineRank) -> None:
        self._messages.put_nowait([RankReady(rank)])

    def is_over(self, end: End, error: ErrorInfo | None = None) -> None:
        """The first word counts."""
        if self._end.done():
            return
        if error is not None:
            self._messages.put_nowait([EngineFailed(error)])
        self._messages.put_nowait([])
        self._end.set_result(end)

    def post(self, message: Message) -> None:
        """Nobody listens: rank 0 is never distant."""

    async def receive(self) -> list[EngineMessage]:
        return await self._messages.get()

    async def end(self) -> End:
        return await asyncio.shield(self._end)

    def kill(self) -> None:
        if not self._end.done():
            self._send(EndRanks(self._life))

    async def close(self) -> None:
        """Its host has closed it."""


class RankHosts:
    """All further hosts of one worker. `on_leaving` is called when one of them was asked to end."""

    def __init__(self, nodes: int, on_leaving: Callable[[], None], clock: Clock) -> None:
        self.nodes = nodes
        """This one counted."""
        self.host = ""
        """Where ranks on other hosts reach those of this one."""
        self.address = ""
        """Where to listen for them."""
        self._on_leaving = on_leaving
        self._clock = clock
        self._links: dict[int, Link] = {}
        """By node."""
        self._came = asyncio.Event()
        self._life = 0
        self._ranks: dict[int, dict[int, DistantRank]] = {}
        """Of the present life, by node and number."""
        self._dead: set[ProcessIdentity] = set()
        """By the word of the kernel of one of these hosts."""

    def listen_at(self, host: str, address: str) -> None:
        self.host, self.address = host, address

    @property
    def missing(self) -> list[int]:
        """The nodes of those that have no link."""
        return [node for node in range(1, self.nodes) if node not in self._links]

    async def all_there(self) -> None:
        """Returns when none is missing."""
        while self.missing:
            log.info("waiting for the further hosts of this worker", nodes=self.missing)
            self._came.clear()
            await self._came.wait()

    def start(self, size: int, meeting_port: int, door: RankDoor) -> list[RankProcess]:
        """Has them start their ranks of `size`: those that follow this host's own, in order. All must be there."""
        self._life += 1
        count = size // self.nodes
        for node, link in sorted(self._links.items()):
            first = node * count
            self._ranks[node] = {number: DistantRank(self._life, link.post) for number in range(first, first + count)}
            link.post(StartRanks(self._life, first, count, size, self.nodes, meeting_port, door.port, door.token))
        return [rank for node in range(1, self.nodes) for rank in self._ranks[node].values()]

    def is_dead(self, process: ProcessIdentity) -> bool:
        """Whether one of these hosts has said so. Who is told False may ask again: they are asked meanwhile."""
        if process in self._dead:
            return True
        for link in self._links.values():
            link.post(DeathAsked(process))
        return False

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """The link of one rank host, while it lasts."""
        link = await accept(request)
        node = 0
        try:
            node = self._welcome(decode_rank_message(await link.frame()), link)
            while self._links.get(node) is link:
                self._hear(node, decode_rank_message(await link.frame()))
        except LinkClosed:
            pass
        except ProtocolError as error:
            log.error("refused a rank host", peer=link.peer, error=str(error))
            link.post(Refused(error.to_info()))
        finally:
            self._lose(node, link)
            await link.close()
        return web.Response()

    async def close(self) -> None:
        """All of them lose their links, and end what they run."""
        links = dict(self._links)
        for node, link in links.items():
            self._lose(node, link)
        await asyncio.gather(*(link.close() for link in links.values()))

    # --- inside ------------------------------------------------------------------------------------------------------

    def _welcome(self, hello: RankMessage, link: Link) -> int:
        """Raises `UnknownMessage` for one who does not belong here."""
        if not isinstance(hello, RankHostHello):
            raise UnknownMessage(f"expected the hello of a rank host, got {type(hello).__name__}")
        if hello.version != SCHEMA_VERSION:
            raise UnknownMessage(f"the rank host speaks schema version {hello.version}, this worker {SCHEMA_VERSION}")
        if not 0 < hello.node < self.nodes:
            raise UnknownMessage(
                f"the rank host is of node {hello.node}: this worker has {self.nodes}, and itself is 0"
            )
        before = self._links.get(hello.node)
        if before is not None:
            self._lose(hello.node, before)
        self._links[hello.node] = link
        self._came.set()
        log.info("rank host connected", node=hello.node, peer=link.peer)
        return hello.node

    def _lose(self, node: int, link: Link) -> None:
        """Ignored for a link that another has replaced."""
        if self._links.get(node) is not link:
            return
        del self._links[node]
        log.info("rank host gone", node=node)
        for rank in self._ranks.get(node, {}).values():
            rank.is_over(End(f"the rank host of node {node} was lost", well=False))

    def _hear(self, node: int, message: RankMessage) -> None:
        """Raises `UnknownMessage`."""
        if isinstance(message, DeathWitnessed):
            self._dead.add(message.process)
        elif isinstance(message, HostLeaving):
            log.info("a host of this worker is asked to end: draining", node=node)
            self._on_leaving()
        elif not isinstance(message, RankUp | RanksSeen | RankOver):
            raise UnknownMessage(f"{type(message).__name__} does not come from a rank host")
        elif message.life == self._life:
            self._hear_of_ranks(self._ranks.get(node, {}), message)

    def _hear_of_ranks(self, ranks: dict[int, DistantRank], message: RankUp | RanksSeen | RankOver) -> None:
        numbers = [seen.number for seen in message.ranks] if isinstance(message, RanksSeen) else [message.number]
        if not ranks.keys() >= set(numbers):
            raise UnknownMessage(f"ranks {numbers} are not of that rank host, which has {list(ranks)}")
        if isinstance(message, RankUp):
            ranks[message.number].is_up(message.rank)
        elif isinstance(message, RankOver):
            ranks[message.number].is_over(End(message.words, message.well), message.error)
        else:
            for seen in message.ranks:
                age = seen.oldest_transfer_age
                oldest = None if age is None else self._clock.now() - age
                ranks[seen.number].board.heard(seen.engine, seen.transfers, oldest)

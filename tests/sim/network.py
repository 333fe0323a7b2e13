"""The network of the simulation: links that are ordered and reliable until they break, and hosts that lose each other.

A `SimLink` is one end of a connection and has the interface of `cluster.links.Link`, so that the real control plane
runs on it. Its messages arrive in order, each after a delay of its own; what is under way when the connection breaks is
lost; the two ends hear of the break at different moments. While two hosts are cut off from each other, messages wait,
as TCP lets them, until the cut heals or the connection's keep-alive gives up.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

from cluster.links import PING_SECONDS, LinkClosed
from cluster.messages import Message, PeerHello
from tests.sim.kernel import SimLoop, Strand

DIAL_SECONDS = 5.0
KEEPALIVE_SECONDS = 1.5 * PING_SECONDS
"""A connection whose other side is silent for so long is closed."""

NOTICE_SECONDS = ((0.0, 0.0), (0.0, 0.05), (0.05, 0.6))
"""Until one end hears that its connection is broken: at once, soon, or late."""

Serve = Callable[[str, "SimLink"], Coroutine[Any, Any, None]]
"""What a server does with a path and its end of a new connection."""


class SimLink:
    """One end of a connection: interface of `cluster.links.Link`."""

    def __init__(self, network: Network, strand: Strand, host: str, peer: str) -> None:
        self.peer = peer
        self.host = host
        self.strand = strand
        self.other: SimLink
        self.closed = False
        self._network = network
        self._inbox: deque[Message] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._last_arrival = 0.0
        self._number = network.next_number()

    def __hash__(self) -> int:
        """The same in each run, since sets of links are iterated."""
        return self._number

    def post(self, message: Message) -> None:
        if not self.closed:
            self._network.carry(self, self.other, message)

    async def receive(self) -> Message:
        while not self._inbox:
            if self.closed:
                raise LinkClosed(f"the link to {self.peer} is closed")
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return self._inbox.popleft()

    async def close(self) -> None:
        """What was posted before still arrives; then the other side hears of the end."""
        if not self.closed:
            self.end()
            self._network.tell_end(self.other)

    # --- the network's side -------------------------------------------------------------------------------------------

    def arrives_at(self, now: float, delay: float) -> float:
        """When a message that leaves now gets here: never before an earlier one."""
        self._last_arrival = max(self._last_arrival, now + delay)
        return self._last_arrival

    def take(self, message: Message) -> None:
        if not self.closed:
            self._inbox.append(message)
            self._wake()

    def end(self) -> None:
        """This side knows that it is over; what has arrived can still be read."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Session:
    """What a process dials with, in place of an `aiohttp.ClientSession`; see `dial`."""

    def __init__(self, network: Network, strand: Strand, host: str) -> None:
        self.network = network
        self.strand = strand
        self.host = host


async def dial(session: Session, url: str, *args: object, **settings: object) -> SimLink:
    """In place of `cluster.links.dial`."""
    _, _, rest = url.partition("://")
    server, _, path = rest.partition("/")
    server = server.partition(":")[0]
    return await session.network.dial(session, server, path)


class Network:
    """All links, servers and cuts. `heard(link, message)` hears of each message as it arrives."""

    def __init__(self, loop: SimLoop, random: Random, heard: Callable[[SimLink, Message], None]) -> None:
        self._loop = loop
        self._random = random
        self._heard = heard
        self._servers: dict[str, tuple[Strand, Serve]] = {}
        self._cuts: dict[frozenset[str], int] = {}
        self._links: list[SimLink] = []
        self._held: list[tuple[SimLink, Message | None]] = []
        """What arrived at a cut, in order; None: the end of the link."""
        self._to_lose: Counter[frozenset[str]] = Counter()
        self._numbers = 0

    def next_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def listen(self, server: str, strand: Strand, serve: Serve) -> None:
        self._servers[server] = (strand, serve)

    def reachable(self, a: str, b: str) -> bool:
        return not self._cuts or frozenset((a, b)) not in self._cuts

    async def dial(self, session: Session, server: str, path: str) -> SimLink:
        """Raises `LinkClosed` if nobody listens there, or nobody answers."""
        loop = self._loop
        await asyncio.sleep(self._delay())
        strand, serve = self._servers.get(server, (None, None))
        if not self.reachable(session.host, server) or (strand is not None and strand.alive and strand.holds):
            await asyncio.sleep(DIAL_SECONDS)
            raise LinkClosed(f"can't connect to {server}: timeout")
        if strand is None or serve is None or not strand.alive:
            raise LinkClosed(f"can't connect to {server}: refused")
        near = SimLink(self, session.strand, session.host, server)
        far = SimLink(self, strand, server, session.host)
        near.other, far.other = far, near
        self._links = [link for link in self._links if not link.closed]
        self._links += [near, far]
        loop.spawn(strand, serve(path, far))
        return near

    # --- messages -----------------------------------------------------------------------------------------------------

    def carry(self, sender: SimLink, receiver: SimLink, message: Message) -> None:
        if self._to_lose and self._loses(frozenset((sender.host, receiver.host)), message):
            return
        now = self._loop.now()
        when = receiver.arrives_at(now, self._delay())
        self._loop.at(when - now, None, self._arrive, receiver, message)

    def _arrive(self, receiver: SimLink, message: Message | None) -> None:
        if not self.reachable(receiver.host, receiver.other.host):
            self._held.append((receiver, message))
        else:
            self._hand_over(receiver, message)

    def _hand_over(self, receiver: SimLink, message: Message | None) -> None:
        if receiver.closed or not receiver.strand.alive:
            return
        if message is None:
            self._loop.at(0.0, receiver.strand, receiver.end)
        else:
            self._heard(receiver, message)
            self._loop.at(0.0, receiver.strand, receiver.take, message)

    def tell_end(self, receiver: SimLink) -> None:
        """An orderly end: behind all that was sent."""
        now = self._loop.now()
        when = receiver.arrives_at(now, self._delay())
        self._loop.at(when - now, None, self._arrive, receiver, None)

    def _delay(self) -> float:
        """Mostly a quick local network; now and then a slow moment."""
        chance = self._random.random()
        return 0.0002 + 0.002 * chance if chance < 0.97 else self._random.uniform(0.005, 0.06)

    # --- faults -------------------------------------------------------------------------------------------------------

    def break_links(self, a: str, b: str) -> None:
        """Breaks what connects two hosts: each end hears of it at its own moment, and what is under way is lost."""
        for link in self._links:
            if {link.host, link.other.host} == {a, b}:
                self._break(link)

    def process_died(self, host: str, strand: Strand) -> None:
        """The kernel of a dead process closes its connections; over a cut nobody hears of it before the keep-alive."""
        for link in self._links:
            if link.other.strand is strand and not link.closed:
                far = not self.reachable(link.host, host)
                self._break(link, KEEPALIVE_SECONDS if far else 0.0)

    def lose(self, a: str, b: str, count: int) -> None:
        """The next messages between two workers."""
        self._to_lose[frozenset((a, b))] += count

    def _loses(self, pair: frozenset[str], message: Message) -> bool:
        if not self._to_lose[pair] or isinstance(message, PeerHello):
            return False
        self._to_lose[pair] -= 1
        return True

    def cut(self, a: str, b: str, seconds: float) -> None:
        """Nothing passes between two hosts for so long."""
        pair = frozenset((a, b))
        self._cuts[pair] = self._cuts.get(pair, 0) + 1
        self._loop.at(seconds, None, self._heal, pair)
        if seconds > KEEPALIVE_SECONDS:
            self._loop.at(KEEPALIVE_SECONDS, None, self.break_links, a, b)

    def _heal(self, pair: frozenset[str]) -> None:
        self._cuts[pair] -= 1
        if self._cuts[pair]:
            return
        del self._cuts[pair]
        held, self._held = self._held, []
        for link, message in held:
            self._arrive(link, message)

    def _break(self, link: SimLink, after: float = 0.0) -> None:
        # What is under way counts as lost at once: the messages find the end closed, or are forgotten here.
        self._held = [(end, message) for end, message in self._held if end is not link]
        delay = after + self._random.uniform(*self._random.choice(NOTICE_SECONDS))
        link.take = _nothing  # type: ignore[method-assign]
        self._loop.at(delay, link.strand, link.end)


def _nothing(message: Message) -> None:
    """A message to a broken connection is lost."""

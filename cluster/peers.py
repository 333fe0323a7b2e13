"""Connections between the workers of the two pools, as the control process sees them.

A prefill worker dials, a decode worker accepts; after the hellos both do the same: relay handoff messages between the
link and the engine process, and tell it who came and went. At most one link per peer: a new one replaces the old.

One question a control process answers by itself: whether a process of its host is dead, a former engine process of its
own, say. It comes from decode workers of other hosts, with pages that this process might still write to. A worker whose
ranks are on several hosts asks those, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import msgspec

from cluster import process_identity
from cluster.engine_messages import FromPeer, PeerDown, PeerUp, ToPeer
from cluster.errors import LayoutMismatch, StaleFence, UnknownMessage, from_info
from cluster.layout import SCHEMA_VERSION
from cluster.links import Link, LinkClosed
from cluster.logging import get_logger
from cluster.messages import (
    Abort,
    Aborted,
    Ack,
    DeathAsked,
    DeathWitnessed,
    Done,
    Grant,
    Message,
    Offer,
    PeerHello,
    ProcessIdentity,
    Refused,
    Role,
)

log = get_logger(__name__)

FOR_ENGINE = (Offer, Grant, Done, Ack, Abort, Aborted, DeathWitnessed)


def require_compatible(ours: PeerHello, theirs: PeerHello) -> None:
    """Raises `LayoutMismatch` or `UnknownMessage`, with both sides' values, unless the two can hand over KV; and
    `StaleFence` if their hello is for another life of this worker, or for whoever was at this address before."""
    if theirs.version != ours.version:
        raise UnknownMessage(
            f"{theirs.worker} speaks schema version {theirs.version}, {ours.worker} speaks {SCHEMA_VERSION}: "
            "update the older one"
        )
    if theirs.to_epoch not in (0, ours.epoch):
        raise StaleFence(f"{ours.worker} is of epoch {ours.epoch}, the hello of {theirs.worker} for {theirs.to_epoch}")
    ours.layout.require_compatible(theirs.layout, ours=ours.worker, theirs=theirs.worker)
    if theirs.layout.grid.ranks != len(theirs.ranks):
        raise LayoutMismatch(f"{theirs.worker} has {len(theirs.ranks)} ranks, its layout {theirs.layout.grid.ranks}")
    if theirs.transfer != ours.transfer:
        raise LayoutMismatch(
            f"transfer engines differ: {ours.worker} uses {ours.transfer}, {theirs.worker} uses {theirs.transfer}"
        )


def addressed(ours: PeerHello, epoch: int) -> PeerHello:
    """Our hello to that life of the other side, and to no other."""
    return msgspec.structs.replace(ours, to_epoch=epoch)


async def receive_hello(link: Link, role: Role) -> PeerHello:
    """The first frame of a peer of `role`. Raises `ProtocolError` for anything else, and what a refusal says."""
    message = await link.receive()
    if isinstance(message, Refused):
        raise from_info(message.error)
    if not isinstance(message, PeerHello) or message.role is not role:
        raise UnknownMessage(f"expected the hello of a {role.value} worker, got {message}")
    return message


class Witnesses(Protocol):
    """Hosts whose kernels may know what ours does not."""

    def is_dead(self, process: ProcessIdentity) -> bool:
        """Whether one of them has said so. Who is told False may ask again: they are asked meanwhile."""


class PeerTable:
    """The connected peers of one worker. `post` gives a message to the engine process.

    Serves between `open` and `close`, which come with each life of the engine process.
    """

    def __init__(
        self, post: Callable[[Message], None], on_count: Callable[[int], None], elsewhere: Witnesses | None = None
    ) -> None:
        """`elsewhere`: the further hosts of this worker."""
        self._post = post
        self._elsewhere = elsewhere
        self._on_count = on_count
        self._links: dict[str, tuple[int, Link]] = {}
        self._opened = asyncio.Event()
        self.ours: PeerHello | None = None
        """How this worker introduces itself; None while it has no engine process."""

    def open(self, ours: PeerHello) -> None:
        """An engine process is ready."""
        self.ours = ours
        self._opened.set()

    async def close(self) -> None:
        """It is dead, or about to be: every peer loses its link."""
        self.ours = None
        self._opened.clear()
        links, self._links = [link for _, link in self._links.values()], {}
        self._on_count(0)
        await asyncio.gather(*(link.close() for link in links))

    async def hello(self) -> PeerHello:
        """`ours`, as soon as there is one."""
        while self.ours is None:
            await self._opened.wait()
        return self.ours

    def send(self, message: ToPeer) -> None:
        """To that instance, if it is connected; else dropped, as `ToPeer` says."""
        epoch, link = self._links.get(message.worker, (None, None))
        if link is not None and epoch == message.epoch:
            link.post(message.message)

    async def relay(self, ours: PeerHello, hello: PeerHello, link: Link) -> None:
        """Serves a checked peer, who knows us by `ours`, until its link ends. Raises `LinkClosed`, or `ProtocolError`
        for a bad frame."""
        if self.ours is not ours:
            raise LinkClosed("our engine process has ended meanwhile")
        self._drop(hello.worker)
        self._links[hello.worker] = (hello.epoch, link)
        self._post(PeerUp(hello))
        self._on_count(len(self._links))
        log.info("peer connected", peer=hello.worker, peer_epoch=hello.epoch)
        try:
            while True:
                message = await link.receive()
                if isinstance(message, FOR_ENGINE):
                    self._post(FromPeer(hello.worker, hello.epoch, message))
                elif not isinstance(message, DeathAsked):
                    raise UnknownMessage(f"{type(message).__name__} does not belong between workers")
                elif self._is_dead(message.process):
                    link.post(DeathWitnessed(message.process))
        finally:
            if self._links.get(hello.worker) == (hello.epoch, link):
                self._drop(hello.worker)

    def _is_dead(self, process: ProcessIdentity) -> bool:
        """Only with proof."""
        if process_identity.is_dead(process):
            return True
        return self._elsewhere is not None and self._elsewhere.is_dead(process)

    def _drop(self, worker: str) -> None:
        epoch, link = self._links.pop(worker, (0, None))
        if link is not None:
            self._post(PeerDown(worker, epoch))
            self._on_count(len(self._links))
            log.info("peer disconnected", peer=worker, peer_epoch=epoch)

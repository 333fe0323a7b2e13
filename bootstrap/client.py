"""What workers and routers use of bootstrap: to be a member, and to know the members.

Both keep trying: while bootstrap is away nothing is known to have changed, and serving goes on with what is known.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp

from cluster.errors import ProtocolError, UnknownMessage, from_info
from cluster.links import Backoff, Link, LinkClosed, dial
from cluster.logging import get_logger
from cluster.messages import (
    Heartbeat,
    Joined,
    Leave,
    Left,
    Load,
    Member,
    MemberStatus,
    Refused,
    Register,
    Registered,
    Roster,
    Watch,
)

log = get_logger(__name__)


class Registration:
    """Keeps one worker a member: registers, heartbeats with `load()`, registers again when bootstrap comes back."""

    def __init__(
        self, session: aiohttp.ClientSession, bootstrap_url: str, member: Member, load: Callable[[], Load]
    ) -> None:
        self._session = session
        self._url = f"{bootstrap_url}/members"
        self._member = member
        self._load = load
        self._link: Link | None = None
        self._left = False
        self.registered = asyncio.Event()
        """Set once bootstrap has accepted this worker, and from then on."""

    async def run(self) -> None:
        """Runs until `leave`, or until cancelled. Raises the typed error if bootstrap refuses this worker."""
        backoff = Backoff()
        while not self._left:
            try:
                link = await dial(self._session, self._url)
            except LinkClosed as error:
                log.debug("bootstrap is away", reason=str(error))
            else:
                await self._serve(link, backoff)
            if not self._left:
                await asyncio.sleep(backoff.next())

    async def leave(self, reason: str) -> None:
        """Tells bootstrap that this instance takes no new work, and ends `run`. While bootstrap is away nobody is told:
        the lease has ended then, or will. A second call does nothing."""
        self._left = True
        if self._link is not None:
            self._link.post(Leave(self._member.worker, self._member.epoch, reason))
            await self._link.close()

    async def _serve(self, link: Link, backoff: Backoff) -> None:
        beat: asyncio.Task[None] | None = None
        try:
            link.post(Register(self._member))
            while True:
                message = await link.receive()
                if isinstance(message, Registered) and beat is None:
                    backoff.reset()
                    self._link = link
                    self.registered.set()
                    log.info("registered", worker=self._member.worker, epoch=self._member.epoch)
                    beat = asyncio.create_task(self._beat(link, message.heartbeat_seconds))
                elif isinstance(message, Refused):
                    raise from_info(message.error)
        except (LinkClosed, UnknownMessage) as error:
            log.warning("lost bootstrap", reason=str(error))
        finally:
            self._link = None
            if beat is not None:
                beat.cancel()
            await link.close()

    async def _beat(self, link: Link, interval: float) -> None:
        while True:
            link.post(Heartbeat(self._member.worker, self._member.epoch, self._load()))
            await asyncio.sleep(interval)


class RosterWatcher:
    """Follows the membership. `members` is what was last known; `on_change` runs after each change of it.

    `on_change` gets (joined, left): the instances that came and those that went. A worker with a new epoch is both.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        bootstrap_url: str,
        watcher: str,
        on_change: Callable[[list[Member], list[Member]], None],
    ) -> None:
        self._session = session
        self._url = f"{bootstrap_url}/watch"
        self._watcher = watcher
        self._on_change = on_change
        self.members: dict[str, Member] = {}
        self.synced = asyncio.Event()
        """Set once the first roster has arrived."""

    async def run(self) -> None:
        """Runs until cancelled."""
        backoff = Backoff()
        while True:
            try:
                link = await dial(self._session, self._url)
            except LinkClosed as error:
                log.debug("bootstrap is away", reason=str(error))
            else:
                await self._follow(link, backoff)
            await asyncio.sleep(backoff.next())

    async def _follow(self, link: Link, backoff: Backoff) -> None:
        try:
            link.post(Watch(self._watcher))
            while True:
                message = await link.receive()
                backoff.reset()
                if isinstance(message, Refused):
                    raise from_info(message.error)
                self._apply(message)
        except (LinkClosed, ProtocolError) as error:
            log.warning("lost bootstrap", reason=str(error))
        finally:
            await link.close()

    def _apply(self, message: object) -> None:
        if isinstance(message, Roster):
            self._replace(message.members)
            self.synced.set()
        elif isinstance(message, Joined):
            gone = self.members.get(message.member.worker)
            self.members[message.member.worker] = message.member
            self._on_change([message.member], [gone] if gone is not None else [])
        elif isinstance(message, Left):
            gone = self.members.get(message.worker)
            if gone is not None and gone.epoch == message.epoch:
                del self.members[message.worker]
                self._on_change([], [gone])

    def _replace(self, statuses: list[MemberStatus]) -> None:
        """A roster from a bootstrap that has just restarted is still empty: who is missing in it is kept, and goes by
        `Left` or, for a router, with its own link and heartbeats."""
        joined = [status.member for status in statuses if self.members.get(status.member.worker) != status.member]
        replaced = [self.members[member.worker] for member in joined if member.worker in self.members]
        self.members |= {member.worker: member for member in joined}
        if joined or replaced:
            self._on_change(joined, replaced)

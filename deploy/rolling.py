"""`baton drain` and `baton restart`: workers that leave in order, and come back one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Protocol

from cluster.clock import Clock
from cluster.errors import LaunchError, NotFound
from cluster.messages import Member, MemberStatus, Role

POLL_SECONDS = 0.2


class Workers(Protocol):
    """The workers as `deploy.cluster_client.BootstrapClient` sees them, and asks them."""

    async def workers(self) -> list[MemberStatus]: ...

    async def drain(self, member: Member, *, restart: bool) -> None: ...

    async def is_gone(self, member: Member) -> bool: ...


class Placement(Protocol):
    """The workers as `deploy.cluster_client.RouterClient` sees them."""

    async def takes_work(self, worker: str, epoch: int) -> bool: ...


class Rolling:
    """Drains and restarts workers of one cluster; `tell` says what happens. What can't be asked is a `LaunchError`."""

    def __init__(
        self,
        workers: Workers,
        router: Placement,
        clock: Clock,
        patience_seconds: float,
        tell: Callable[[str], None],
    ) -> None:
        """`patience_seconds`: how long one worker may take to end, and to come back."""
        self._workers = workers
        self._router = router
        self._clock = clock
        self._patience = patience_seconds
        self._tell = tell

    async def drain(self, names: Sequence[str]) -> None:
        """All at the same time; returns when all have ended. Raises `NotFound` before anything is done if one is not
        known, `LaunchError` if one does not end in time."""
        chosen = await self._choose(names)
        for member in chosen:
            await self._workers.drain(member, restart=False)
            self._tell(f"{member.worker} is draining")
        for member in chosen:
            await self._wait(partial(self._workers.is_gone, member), f"{member.worker} has not ended")
            self._tell(f"{member.worker} has ended")

    async def restart(self, names: Sequence[str]) -> None:
        """One after the other, each when the one before takes work again; no name: all. Raises as `drain` does."""
        for member in await self._choose(names):
            begun = self._clock.now()
            await self._workers.drain(member, restart=True)
            self._tell(f"{member.worker} is draining")
            await self._wait(partial(self._is_back, member), f"{member.worker} has not come back")
            self._tell(f"{member.worker} takes work again, after {self._clock.now() - begun:.1f} s")

    async def _choose(self, names: Sequence[str]) -> list[Member]:
        statuses = await self._workers.workers()
        known = {status.member.worker: status.member for status in statuses}
        unknown = [name for name in names if name not in known]
        if unknown:
            listed = ", ".join(sorted(known)) or "none"
            raise NotFound(f"there is no worker {', '.join(unknown)}; bootstrap knows these: {listed}")
        members = [known[name] for name in names] if names else list(known.values())
        return members if names else sorted(members, key=lambda member: (member.role is Role.DECODE, member.worker))

    async def _is_back(self, before: Member) -> bool:
        """Another instance of the same name is ready, and the router knows it."""
        for status in await self._workers.workers():
            member = status.member
            if member.worker == before.worker and member.epoch > before.epoch and status.load.ready:
                return await self._router.takes_work(member.worker, member.epoch)
        return False

    async def _wait(self, condition: Callable[[], Awaitable[bool]], complaint: str) -> None:
        deadline = self._clock.now() + self._patience
        while not await condition():
            if self._clock.now() > deadline:
                raise LaunchError(f"{complaint} within {self._patience:g} s: its log and that of its launcher say why")
            await asyncio.sleep(POLL_SECONDS)

"""Who is a member: one machine per worker name, all of them in a `RosterState`. Pure: time is an argument.

    ABSENT --Register--> LIVE --Heartbeat--> LIVE
                         LIVE --lease over--> SILENT --Heartbeat, Register--> LIVE
                         LIVE, SILENT --Leave--> ABSENT

A worker's name is its place, its epoch its life: a higher epoch replaces a lower one, a lower one is refused. Who falls
silent is a member no more, but may only have been stopped, or cut off: its connection stands, so it does not register
again, and its next heartbeat brings it back.

The state is soft. After a restart of bootstrap it is empty and the workers register again within one heartbeat.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import msgspec

from cluster.errors import StaleFence
from cluster.messages import Heartbeat, Joined, Leave, Left, Load, Member, MemberStatus, Register, Roster
from cluster.state_machine import StateMachine


class MemberState(Enum):
    ABSENT = "absent"
    LIVE = "live"
    SILENT = "silent"
    """Its lease is over; it has not said goodbye."""


class Tick(msgspec.Struct, frozen=True):
    """Time has passed."""


class Announce(msgspec.Struct, frozen=True):
    """Tell every watcher."""

    message: Joined | Left


class MemberMachine(StateMachine[Announce]):
    """The life of one worker name."""

    TABLE: ClassVar = {
        (MemberState.ABSENT, Register): "_register",
        (MemberState.LIVE, Register): "_register",
        (MemberState.SILENT, Register): "_register",
        (MemberState.ABSENT, Heartbeat): "_ignore",
        (MemberState.LIVE, Heartbeat): "_heartbeat",
        (MemberState.SILENT, Heartbeat): "_come_back",
        (MemberState.ABSENT, Leave): "_ignore",
        (MemberState.LIVE, Leave): "_leave",
        (MemberState.SILENT, Leave): "_leave_silently",
        (MemberState.ABSENT, Tick): "_ignore",
        (MemberState.LIVE, Tick): "_tick",
        (MemberState.SILENT, Tick): "_ignore",
    }

    def __init__(self, worker: str, lease_seconds: float) -> None:
        super().__init__(worker, MemberState.ABSENT)
        self._lease_seconds = lease_seconds
        self._member: Member | None = None
        self._load = Load()
        self._seen = 0.0

    def status(self, now: float) -> MemberStatus | None:
        """None while absent."""
        if self._member is None or self.state is not MemberState.LIVE:
            return None
        return MemberStatus(self._member, self._load, now - self._seen)

    def slept(self, seconds: float) -> None:
        """For so long we heard nobody: that was no silence of this worker's."""
        self._seen += seconds

    def _register(self, event: Register, now: float) -> list[Announce]:
        known, new = self._member, event.member
        if known is not None and new.epoch < known.epoch:
            raise StaleFence(
                f"{self.name} is registered with epoch {known.epoch}; epoch {new.epoch} is of an earlier life"
            )
        again = self.state is MemberState.LIVE and known == new
        self._member, self._seen = new, now
        self.to(MemberState.LIVE)
        if again:
            return []
        self._load = Load()
        return [Announce(Joined(new))]

    def _heartbeat(self, event: Heartbeat, now: float) -> list[Announce]:
        """The watchers don't hear of it: there is one of every worker in each interval, and routers get their own."""
        self._require_epoch(event.epoch)
        self._seen, self._load = now, event.load
        return []

    def _come_back(self, event: Heartbeat, now: float) -> list[Announce]:
        assert self._member is not None
        self._require_epoch(event.epoch)
        self._seen, self._load = now, event.load
        self.to(MemberState.LIVE)
        return [Announce(Joined(self._member))]

    def _leave(self, event: Leave, now: float) -> list[Announce]:
        self._require_epoch(event.epoch)
        self.to(MemberState.ABSENT)
        return [self._left(event.reason)]

    def _leave_silently(self, event: Leave, now: float) -> list[Announce]:
        """The watchers have heard of its end."""
        self._require_epoch(event.epoch)
        self.to(MemberState.ABSENT)
        return []

    def _tick(self, event: Tick, now: float) -> list[Announce]:
        silent = now - self._seen
        if silent <= self._lease_seconds:
            return []
        self.to(MemberState.SILENT)
        return [self._left(f"no heartbeat for {silent:.1f} s (lease: {self._lease_seconds:.1f} s)")]

    def _ignore(self, event: object, now: float) -> list[Announce]:
        return []

    def _left(self, reason: str) -> Announce:
        assert self._member is not None
        return Announce(Left(self._member.worker, self._member.epoch, reason))

    def _require_epoch(self, epoch: int) -> None:
        if self._member is not None and self._member.epoch != epoch:
            raise StaleFence(f"{self.name} is registered with epoch {self._member.epoch}, the message has {epoch}")


class RosterState:
    """All members of the cluster. Each call returns what the watchers have to hear."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._machines: dict[str, MemberMachine] = {}

    def register(self, event: Register, now: float) -> list[Announce]:
        """Raises `StaleFence` for an epoch that is over."""
        machine = self._machines.setdefault(
            event.member.worker, MemberMachine(event.member.worker, self._lease_seconds)
        )
        return machine.handle(event, now)

    def handle(self, event: Heartbeat | Leave, now: float) -> list[Announce]:
        """Raises `StaleFence` for another epoch; of a worker that is not here it is ignored."""
        machine = self._machines.get(event.worker)
        return machine.handle(event, now) if machine is not None else []

    def tick(self, now: float) -> list[Announce]:
        """Ends the leases that ran out."""
        return [announce for machine in self._machines.values() for announce in machine.handle(Tick(), now)]

    def slept(self, seconds: float) -> None:
        """For so long bootstrap itself was stopped or stuck: heartbeats may be waiting to be heard."""
        for machine in self._machines.values():
            machine.slept(seconds)

    def roster(self, now: float) -> Roster:
        statuses = (machine.status(now) for machine in self._machines.values())
        return Roster([status for status in statuses if status is not None])

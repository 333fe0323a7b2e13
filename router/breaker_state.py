"""One leg of one worker, as the router's choices have found it: who fails again and again is left alone for a while.

    CLOSED --LegBlamed, too often--> OPEN --LegBegan, after its time--> HALF_OPEN --LegProved, LegSucceeded--> CLOSED
                                     OPEN <--LegBlamed, LegEnded------- HALF_OPEN
                                     OPEN --LegSucceeded--> CLOSED

`shut` tells placement to look elsewhere. In HALF_OPEN one attempt is there to see, the probe; the others, that were
there before, can only speak for the worker. Blame counts, whichever leg tells of it. What breaks breaks many attempts
in one moment: failures in quick succession are one. A worker that has proved itself after it was shut is on trial:
until an attempt ends well there, the next failure shuts it again, for twice as long.

Pure: time is an argument. It is kept by worker, not by epoch: a worker that dies of each request dies in many lives.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar, Union

import msgspec

from cluster.config import Recovery
from cluster.messages import Fence
from cluster.state_machine import StateMachine

BURST_SECONDS = 0.5
"""Failures within so long of the first of them are one."""


class BreakerState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half open"


# --- events ----------------------------------------------------------------------------------------------------------


class LegBegan(msgspec.Struct, frozen=True):
    """An attempt's leg was given to the worker."""

    fence: Fence


class LegProved(msgspec.Struct, frozen=True):
    """It has got so far that what ailed the worker is over: decode has taken over KV and computes."""

    fence: Fence


class LegSucceeded(msgspec.Struct, frozen=True):
    """It has done its part, to the end."""

    fence: Fence


class LegBlamed(msgspec.Struct, frozen=True):
    """The attempt has failed by this leg's fault."""

    fence: Fence


class LegEnded(msgspec.Struct, frozen=True):
    """It is over, and nothing was learned: the client went, or the other leg failed."""

    fence: Fence


# --- actions ---------------------------------------------------------------------------------------------------------


class Opened(msgspec.Struct, frozen=True):
    """The worker is shut for so long."""

    seconds: float


class Reclosed(msgspec.Struct, frozen=True):
    """The worker is in use again."""


Event = Union[LegBegan, LegProved, LegSucceeded, LegBlamed, LegEnded]
Action = Union[Opened, Reclosed]


class BreakerMachine(StateMachine[Action]):
    TABLE: ClassVar = {
        (BreakerState.CLOSED, LegBegan): "_ignore",
        (BreakerState.CLOSED, LegProved): "_ignore",
        (BreakerState.CLOSED, LegSucceeded): "_forgive",
        (BreakerState.CLOSED, LegBlamed): "_count",
        (BreakerState.CLOSED, LegEnded): "_ignore",
        (BreakerState.OPEN, LegBegan): "_probe",
        (BreakerState.OPEN, LegProved): "_ignore",
        (BreakerState.OPEN, LegSucceeded): "_close",
        (BreakerState.OPEN, LegBlamed): "_ignore",
        (BreakerState.OPEN, LegEnded): "_ignore",
        (BreakerState.HALF_OPEN, LegBegan): "_ignore",
        (BreakerState.HALF_OPEN, LegProved): "_close",
        (BreakerState.HALF_OPEN, LegSucceeded): "_close",
        (BreakerState.HALF_OPEN, LegBlamed): "_probe_failed",
        (BreakerState.HALF_OPEN, LegEnded): "_probe_over",
    }

    def __init__(self, name: str, limits: Recovery) -> None:
        super().__init__(name, BreakerState.CLOSED)
        self._limits = limits
        self._failures = 0
        """In a row; a burst counts once."""
        self._burst_until = float("-inf")
        self._seconds = 0.0
        """How long it was shut the last time."""
        self._shut_until = 0.0
        self._probe_fence: Fence | None = None

    def shut(self, now: float) -> bool:
        """Whether placement should look elsewhere. False for one that is due for a probe."""
        if self.state is BreakerState.OPEN:
            return now < self._shut_until
        return self.state is BreakerState.HALF_OPEN

    @property
    def healthy(self) -> bool:
        """Nothing is held against it."""
        return self.state is BreakerState.CLOSED and not self._failures

    def _count(self, event: LegBlamed, now: float) -> list[Action]:
        if now < self._burst_until:
            return []
        self._burst_until = now + BURST_SECONDS
        self._failures += 1
        return self._open(now) if self._failures >= self._limits.breaker_failures else []

    def _open(self, now: float) -> list[Action]:
        first, longest = self._limits.breaker_seconds, self._limits.longest_breaker_seconds
        self._seconds = min(max(first, self._seconds * 2), longest)
        self._shut_until = now + self._seconds
        self._probe_fence = None
        self.to(BreakerState.OPEN)
        return [Opened(self._seconds)]

    def _probe(self, event: LegBegan, now: float) -> list[Action]:
        # Before its time the worker was the only one left, which makes no probe: there would be no other to compare.
        if now >= self._shut_until:
            self._probe_fence = event.fence
            self.to(BreakerState.HALF_OPEN)
        return []

    def _close(self, event: LegProved | LegSucceeded, now: float) -> list[Action]:
        self._failures = self._limits.breaker_failures - 1
        self._burst_until = now
        self.to(BreakerState.CLOSED)
        if isinstance(event, LegSucceeded):
            self._forgive(event, now)
        return [Reclosed()]

    def _probe_failed(self, event: LegBlamed, now: float) -> list[Action]:
        return self._open(now) if event.fence == self._probe_fence else []

    def _probe_over(self, event: LegEnded, now: float) -> list[Action]:
        """The next one is the probe."""
        if event.fence == self._probe_fence:
            self._shut_until = now
            self.to(BreakerState.OPEN)
        return []

    def _forgive(self, event: LegSucceeded, now: float) -> list[Action]:
        self._failures = 0
        self._seconds = 0.0
        return []

    def _ignore(self, event: Event, now: float) -> list[Action]:
        return []

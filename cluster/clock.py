"""Time as a collaborator: shells ask a `Clock`, tests turn a `ManualClock` by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since an arbitrary start; never goes backwards. Called from any thread."""

    def now(self) -> float: ...


class MonotonicClock:
    """The machine's monotonic clock; on Linux comparable between processes of one host."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("a clock does not go backwards")
        self._now += seconds

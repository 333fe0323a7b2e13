"""When too much of the pool waits for silent writers. Pure: see `cluster.state_machine`.

    OPEN --(more than the share)--> CROWDED --(for too long)--> CLOSING --(nothing runs any more, or too long)--> OVER
      \\________(they came back)_______/_________________________/

Quarantined pages come back by their writer's word or a proof of its death. A writer on another host whose network is
gone gives neither, and its pages are lost to us for as long. No clock may free them; but a new engine process has a
pool that nobody was ever granted pages of. So a worker that has lost too many ends its own: what it decodes may finish
before, within `drain_seconds`, and what does not goes on elsewhere, as after any death.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import msgspec

from cluster.errors import QuarantineFull
from cluster.state_machine import StateMachine


class QuarantineState(Enum):
    OPEN = "open"
    CROWDED = "crowded"
    CLOSING = "closing"
    """No new work is taken."""
    OVER = "over"


# --- events ----------------------------------------------------------------------------------------------------------


class Counted(msgspec.Struct, frozen=True):
    """Once a step. `running`: attempts that would be lost if the process ended now."""

    quarantined: int
    running: int


# --- actions ---------------------------------------------------------------------------------------------------------


class Warn(msgspec.Struct, frozen=True):
    """Tell the operator."""

    message: str


class End(msgspec.Struct, frozen=True):
    """End the engine process with this error."""

    error: QuarantineFull


Action = Warn | End


class QuarantineWatch(StateMachine[Action]):
    """Of a pool of `pages`. Times in seconds."""

    TABLE: ClassVar = {
        (QuarantineState.OPEN, Counted): "_look",
        (QuarantineState.CROWDED, Counted): "_wait",
        (QuarantineState.CLOSING, Counted): "_drain_or_end",
        (QuarantineState.OVER, Counted): "_ignore",
    }

    def __init__(self, pages: int, share: float, patience_seconds: float, drain_seconds: float) -> None:
        super().__init__("quarantine", QuarantineState.OPEN)
        self._pages = pages
        self._most = share * pages
        self._patience = patience_seconds
        self._drain_seconds = drain_seconds
        self._since = 0.0

    @property
    def closing(self) -> bool:
        """Whether new work is to be refused."""
        return self.state in (QuarantineState.CLOSING, QuarantineState.OVER)

    def _look(self, event: Counted, now: float) -> list[Action]:
        if event.quarantined <= self._most:
            return []
        self._enter(QuarantineState.CROWDED, now)
        return [Warn(f"{self._told(event)}: their writers are silent")]

    def _wait(self, event: Counted, now: float) -> list[Action]:
        if event.quarantined <= self._most:
            return self._reopen(event, now)
        if now - self._since < self._patience:
            return []
        self._enter(QuarantineState.CLOSING, now)
        return [Warn(f"{self._told(event)}, for {self._patience:g} s: no new work, then a new engine process")]

    def _drain_or_end(self, event: Counted, now: float) -> list[Action]:
        if event.quarantined <= self._most:
            return self._reopen(event, now)
        if event.running and now - self._since < self._drain_seconds:
            return []
        self._enter(QuarantineState.OVER, now)
        return [End(QuarantineFull(f"{self._told(event)}; {event.running} attempts are given up with them"))]

    def _reopen(self, event: Counted, now: float) -> list[Action]:
        self._enter(QuarantineState.OPEN, now)
        return [Warn(f"{self._told(event)}: the others are back")]

    def _ignore(self, event: Counted, now: float) -> list[Action]:
        return []

    def _enter(self, state: QuarantineState, now: float) -> None:
        self._since = now
        self.to(state)

    def _told(self, event: Counted) -> str:
        return f"{event.quarantined} of {self._pages} pages are in quarantine"

"""Whether a worker can take work, and what its control process does about an engine process that can't. Pure.

    STARTING --EngineUp--> READY <--Looked--> STALLED --(for too long)--> KillEngine
    READY, STALLED --EngineDied--> RESTARTING --EngineUp--> READY
                                   RESTARTING --EngineDied (too often)--> GIVEN_UP
    all of them --DrainAsked--> DRAINING

Health is progress, not pulse: the control process looks at the engine process's `ProgressBoard` several times per
heartbeat. A part whose counter stands still for `patience` is stalled; a step that takes half a minute is not, for its
layers count. What stood still and moves again is well again.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import msgspec

from cluster.progress_board import Progress
from cluster.restarts import RestartBudget
from cluster.state_machine import StateMachine

LOOKS_PER_HEARTBEAT = 4
PATIENCE_HEARTBEATS = 2.5
"""With the time between two looks on top, a stall is told before the third heartbeat."""
SHORTEST_PATIENCE = 1.5
"""Seconds: an idle transfer thread marks its progress twice a second, an idle step loop four times."""
AWAY_LOOKS = 4
"""If so many looks have been missed, it was we who were not running (stopped, swapped out, a suspended machine), and
nobody had time to make progress meanwhile."""


class HealthState(Enum):
    STARTING = "starting"
    READY = "ready"
    STALLED = "stalled"
    RESTARTING = "restarting"
    DRAINING = "draining"
    GIVEN_UP = "given up"


class Part(str, Enum):
    """What can stall by itself."""

    ENGINE = "engine"
    TRANSFERS = "transfers"


# --- events ----------------------------------------------------------------------------------------------------------


class EngineUp(msgspec.Struct, frozen=True):
    """An engine process has loaded and can work."""


class EngineDied(msgspec.Struct, frozen=True):
    reason: str


class Looked(msgspec.Struct, frozen=True):
    progress: Progress


class DrainAsked(msgspec.Struct, frozen=True):
    pass


# --- actions ---------------------------------------------------------------------------------------------------------


class Tell(msgspec.Struct, frozen=True):
    """Heartbeats now: readiness has changed."""


class Stalled(msgspec.Struct, frozen=True):
    """A stall begins: for logs and metrics."""

    part: Part
    reason: str


class KillEngine(msgspec.Struct, frozen=True):
    reason: str


class Cause(str, Enum):
    """Why an engine process is started anew."""

    DEATH = "death"
    STALL = "stall"
    """We have killed it."""


class StartEngine(msgspec.Struct, frozen=True):
    after_seconds: float
    cause: Cause = Cause.DEATH


class GiveUp(msgspec.Struct, frozen=True):
    """End with the error of this death; `verdict` says why there is no next try."""

    verdict: str


Action = Tell | Stalled | KillEngine | StartEngine | GiveUp


class WorkerHealth(StateMachine[Action]):
    """One worker, from its start to its end."""

    TABLE: ClassVar = {
        (HealthState.STARTING, EngineUp): "_up",
        (HealthState.STARTING, EngineDied): "_fail",
        (HealthState.STARTING, DrainAsked): "_drain",
        (HealthState.READY, Looked): "_look",
        (HealthState.READY, EngineDied): "_die",
        (HealthState.READY, DrainAsked): "_drain",
        (HealthState.STALLED, Looked): "_look",
        (HealthState.STALLED, EngineDied): "_die",
        (HealthState.STALLED, DrainAsked): "_drain",
        (HealthState.RESTARTING, EngineUp): "_up",
        (HealthState.RESTARTING, EngineDied): "_die",
        (HealthState.RESTARTING, DrainAsked): "_drain",
        (HealthState.DRAINING, EngineUp): "_ignore",
        (HealthState.DRAINING, Looked): "_look",
        (HealthState.DRAINING, EngineDied): "_end",
        (HealthState.DRAINING, DrainAsked): "_ignore",
        (HealthState.GIVEN_UP, DrainAsked): "_ignore",
    }

    def __init__(
        self,
        worker: str,
        heartbeat_seconds: float,
        stall_limit_seconds: float,
        transfer_limit_seconds: float,
        budget: RestartBudget,
    ) -> None:
        """`transfer_limit_seconds`: how long the transfer thread may stand still while the rest goes on. Then a call
        into the transfer engine does not come back, and that thread's own deadline for writes can't help."""
        super().__init__(worker, HealthState.STARTING)
        self.stalled = ""
        """What makes no progress, in words; empty while all does."""
        self._look_seconds = heartbeat_seconds / LOOKS_PER_HEARTBEAT
        self._patience = max(PATIENCE_HEARTBEATS * heartbeat_seconds, SHORTEST_PATIENCE)
        self._limit = max(stall_limit_seconds, self._patience)
        self._transfer_limit = max(min(transfer_limit_seconds, stall_limit_seconds), self._patience)
        self._budget = budget
        self._death = ""
        self._looked = float("-inf")
        self._seen = Progress()
        self._moved = dict.fromkeys(Part, 0.0)
        """When each part was last seen to have moved."""
        self._over_limit = False

    @property
    def ready(self) -> bool:
        """Takes new work."""
        return self.state is HealthState.READY

    @property
    def live(self) -> bool:
        """False: only an end from outside can help."""
        return not self._over_limit

    @property
    def reason(self) -> str:
        """Why it is not ready, in words; empty if it is."""
        if self.ready:
            return ""
        if self.state is HealthState.STALLED:
            return f"stalled: {self.stalled}"
        return f"restarting: {self._death}" if self.state is HealthState.RESTARTING else str(self.state.value)

    # --- transitions -------------------------------------------------------------------------------------------------

    def _up(self, event: EngineUp, now: float) -> list[Action]:
        self._forget_stalls()
        self._looked = float("-inf")  # counters of another process: the first look compares with nothing
        self.to(HealthState.READY)
        return [Tell()]

    def _look(self, event: Looked, now: float) -> list[Action]:
        self._note(event.progress, now)
        still = {part: now - moved for part, moved in self._moved.items()}
        part = max(still, key=lambda part: still[part])
        if still[part] < self._patience:
            return self._moves_again()
        began = not self.stalled
        self.stalled = _in_words(part, still[part], event.progress, now)
        actions: list[Action] = [Stalled(part, self.stalled)] if began else []
        if self.state is HealthState.READY:
            self.to(HealthState.STALLED)
            actions.append(Tell())
        alone = part is Part.TRANSFERS and still[Part.ENGINE] < self._patience
        if still[part] >= (self._transfer_limit if alone else self._limit) and not self._over_limit:
            self._over_limit = True
            actions.append(KillEngine(self.stalled))
        return actions

    def _note(self, progress: Progress, now: float) -> None:
        away = now - self._looked > AWAY_LOOKS * max(self._look_seconds, SHORTEST_PATIENCE / LOOKS_PER_HEARTBEAT)
        excused = away or now < progress.silent_until
        before = self._seen
        moved = {Part.ENGINE: progress.engine != before.engine, Part.TRANSFERS: progress.transfers != before.transfers}
        for part in Part:
            if excused or moved[part]:
                self._moved[part] = now
        self._seen, self._looked = progress, now

    def _moves_again(self) -> list[Action]:
        self._forget_stalls()
        if self.state is not HealthState.STALLED:
            return []
        self.to(HealthState.READY)
        return [Tell()]

    def _die(self, event: EngineDied, now: float) -> list[Action]:
        cause = Cause.STALL if self._over_limit else Cause.DEATH
        self._death = f"killed, as {self.stalled}" if self._over_limit else event.reason
        self._forget_stalls()
        pause = self._budget.died(now)
        if pause is None:
            self.to(HealthState.GIVEN_UP)
            return [GiveUp(self._budget.verdict())]
        self.to(HealthState.RESTARTING)
        return [StartEngine(pause, cause)]

    def _fail(self, event: EngineDied, now: float) -> list[Action]:
        """What can't start once is wrong in itself: a setting, the model, a package."""
        self.to(HealthState.GIVEN_UP)
        return [GiveUp("it could not start")]

    def _drain(self, event: DrainAsked, now: float) -> list[Action]:
        self.to(HealthState.DRAINING)
        return [Tell()]

    def _end(self, event: EngineDied, now: float) -> list[Action]:
        """What was to be finished is lost here; its routers know by now, and go on with it elsewhere."""
        self.to(HealthState.GIVEN_UP)
        return []

    def _ignore(self, event: object, now: float) -> list[Action]:
        return []

    def _forget_stalls(self) -> None:
        self.stalled = ""
        self._over_limit = False


def _in_words(part: Part, seconds: float, progress: Progress, now: float) -> str:
    if part is Part.TRANSFERS:
        oldest = progress.oldest_transfer
        detail = "none was under way" if oldest is None else f"the oldest transfer began {now - oldest:.1f} s ago"
        return f"the transfer thread has made no progress for {seconds:.1f} s ({detail})"
    began = progress.step_began
    detail = "between two steps" if began is None else f"in a step that began {now - began:.1f} s ago"
    return f"the engine process has made no progress for {seconds:.1f} s ({detail})"

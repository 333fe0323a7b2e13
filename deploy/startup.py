"""How far each process of a starting cluster has come. Pure: observations and times in, a view out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from cluster.messages import MemberStatus
from deploy.launchers.base import ProcessKind
from deploy.launchers.processes import ProcessSpec


class Phase(str, Enum):
    STARTING = "starting"
    """Runs, but has said nothing yet: Python is importing."""
    LOADING = "loading"
    """Works on being ready; its log says on what."""
    REGISTERED = "registered"
    """A worker that bootstrap knows, but that takes no work yet."""
    READY = "ready"


class Observation(NamedTuple):
    """What was seen of the cluster at one moment."""

    roster: Sequence[MemberStatus] | None
    """None: bootstrap does not answer yet."""
    router_healthy: bool
    last_events: Mapping[str, str]
    """By process: the last event in its log, if there is one."""


class Progress(NamedTuple):
    """How far one process is."""

    name: str
    phase: Phase
    seconds: float
    """From the cluster's start until it was ready; so far, if it is not."""
    event: str
    """The last in its log."""


class Startup:
    """Follows the processes `specs`, the first of which was started at time `now`."""

    def __init__(self, specs: Sequence[ProcessSpec], now: float) -> None:
        self._specs = specs
        self._began = now
        self._progress = {spec.name: Progress(spec.name, Phase.STARTING, 0.0, "") for spec in specs}

    @property
    def progress(self) -> list[Progress]:
        """Of each process, in the order of their start."""
        return list(self._progress.values())

    @property
    def ready(self) -> bool:
        return all(progress.phase is Phase.READY for progress in self._progress.values())

    def waiting_for(self) -> Collection[str]:
        """The names of the processes that are not ready."""
        return [name for name, progress in self._progress.items() if progress.phase is not Phase.READY]

    def observe(self, seen: Observation, now: float) -> list[Progress]:
        """Takes in what was seen; returns the processes whose phase has changed."""
        changed = []
        for spec in self._specs:
            before = self._progress[spec.name]
            event = seen.last_events.get(spec.name, "")
            phase = _phase(spec, seen, bool(event))
            still_ready = phase is before.phase is Phase.READY
            seconds = before.seconds if still_ready else now - self._began
            after = self._progress[spec.name] = Progress(spec.name, phase, seconds, event)
            if phase is not before.phase:
                changed.append(after)
        return changed


def _phase(spec: ProcessSpec, seen: Observation, has_spoken: bool) -> Phase:
    if spec.kind is ProcessKind.ROUTER:
        up = seen.router_healthy
    elif spec.kind is ProcessKind.BOOTSTRAP:
        up = seen.roster is not None
    else:
        status = next((status for status in seen.roster or () if status.member.worker == spec.name), None)
        if status is not None and not status.load.ready:
            return Phase.REGISTERED
        up = status is not None
    if up:
        return Phase.READY
    return Phase.LOADING if has_spoken else Phase.STARTING

"""What a place must do that only runs processes: start them, tell of their ends, stop them. `deploy.session` does the
rest."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from deploy.launchers.base import ProcessKind


class ProcessSpec(NamedTuple):
    """One process: `python -m module arguments`; which topology it reads, its place adds. `name` is unique in the
    cluster, a worker's is its name there."""

    name: str
    kind: ProcessKind
    module: str
    arguments: tuple[str, ...]
    node: int = 0
    """Of a worker whose ranks are on several hosts, which of them it is on; on all but the first its name is that of
    the worker, a dot, and this."""
    nodes: int = 1

    @property
    def worker(self) -> str:
        """The name of the whole."""
        return self.name.removesuffix(f".{self.node}") if self.node else self.name


class ProcessExit(NamedTuple):
    """A process's end. `code` as the system tells it: negative is the signal that killed it."""

    name: str
    code: int
    lost: str = ""
    """Why nobody can tell its exit code: what it ran on is gone."""

    def __str__(self) -> str:
        if self.lost:
            return f"{self.name} was lost: {self.lost}"
        if self.code >= 0:
            return f"{self.name} ended (exit code {self.code})"
        return f"{self.name} was killed ({signal.Signals(-self.code).name})"


class ProcessStatus(NamedTuple):
    name: str
    running: bool
    log: str
    """The file, on this machine, to which all is written that it prints."""
    instance: str = ""
    """Of two lives of one name, different; empty while it has no place to run."""
    node: str = ""
    """Where it runs."""
    started_ns: int = 0
    """Nanoseconds since 1970 by the clock of its node: no epoch of this life is earlier."""
    waiting_for: str = ""
    """Started, but without a place: what it waits for."""


class ProcessRunner(Protocol):
    """Called by one session, on one event loop. The session owns the processes: it stops what it has started."""

    async def start(self, process: ProcessSpec) -> None:
        """Starts a process and returns at once; after its end also once more, with the same log. Raises `LaunchError`
        if it can't be started."""

    async def stop(self, names: Sequence[str], grace_seconds: float) -> None:
        """Asks those processes to end, together; kills, with all they have started, what is still there after
        `grace_seconds`. Returns when they are gone. Unknown names and ended processes are fine."""

    async def next_exit(self) -> ProcessExit:
        """Waits for the next end of a process that nobody stopped; each is told once."""

    def status(self) -> list[ProcessStatus]:
        """All processes ever started, in that order."""

    def log_tail(self, name: str, lines: int) -> list[str]:
        """The last lines of a process's log, oldest first; after its end, all of them are there."""

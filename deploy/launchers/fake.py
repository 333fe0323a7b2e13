"""Processes that exist in memory only: tests let them write, refuse to stop, and die."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from cluster.errors import LaunchError
from deploy.launchers.processes import ProcessExit, ProcessSpec, ProcessStatus


class FakeProcesses:
    """A `ProcessRunner`. `stopped` has the names of the processes in the order in which they were stopped."""

    def __init__(self, cannot_start: frozenset[str] = frozenset()) -> None:
        self.started: list[ProcessSpec] = []
        self.stopped: list[str] = []
        self._cannot_start = cannot_start
        self._running: dict[str, bool] = {}
        self._logs: dict[str, list[str]] = {}
        self._exits: asyncio.Queue[ProcessExit] = asyncio.Queue()

    async def start(self, process: ProcessSpec) -> None:
        if process.name in self._cannot_start:
            raise LaunchError(f"{process.name} can't be started: told so")
        self.started.append(process)
        self._running[process.name] = True
        self._logs.setdefault(process.name, [])

    async def stop(self, names: Sequence[str], grace_seconds: float) -> None:
        for name in names:
            if self._running.get(name):
                self._running[name] = False
                self.stopped.append(name)

    async def next_exit(self) -> ProcessExit:
        return await self._exits.get()

    def status(self) -> list[ProcessStatus]:
        lives = Counter(spec.name for spec in self.started)
        return [
            ProcessStatus(name, running, "memory", instance=f"{name}/{lives[name]}", node="memory")
            for name, running in self._running.items()
        ]

    def log_tail(self, name: str, lines: int) -> list[str]:
        return self._logs[name][-lines:]

    def write(self, name: str, line: str) -> None:
        """Appends to a process's log."""
        self._logs[name].append(line)

    def die(self, name: str, code: int) -> None:
        """Ends a process that nobody stopped."""
        self._running[name] = False
        self._exits.put_nowait(ProcessExit(name, code))

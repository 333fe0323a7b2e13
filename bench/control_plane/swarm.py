"""Many simulated workers in a process of their own, so that what they cost is not counted as the control plane's.

Here is the parent's half; `bench.control_plane.swarm_process` is the other one. They speak by lines of JSON.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import TracebackType
from typing import Union

import msgspec
import psutil

from cluster.errors import LaunchError

ANSWER_SECONDS = 60.0


class Count(msgspec.Struct, frozen=True, tag=True):
    """Asks how the swarm is."""


class Cut(msgspec.Struct, frozen=True, tag=True):
    """This worker's process is gone."""

    index: int


class Hush(msgspec.Struct, frozen=True, tag=True):
    """This worker says nothing any more."""

    index: int


class Revive(msgspec.Struct, frozen=True, tag=True):
    """This worker begins a new life."""

    index: int


Command = Union[Count, Cut, Hush, Revive]


class Told(msgspec.Struct, frozen=True):
    """The answer to each command."""

    at: float
    """When it was carried out, in seconds since 1970."""
    name: str = ""
    """Of the worker that was meant."""
    registrations: int = 0
    """Accepted by bootstrap, over all workers and lives."""
    heard: int = 0
    """What bootstrap has told those that follow the roster."""


class Swarm:
    """`async with Swarm(...)`: so many workers of the topology's cluster; leaves no process behind."""

    def __init__(self, topology: Path, workers: int, log: Path) -> None:
        self.workers = workers
        self._topology = topology
        self._log = log

    def cpu_seconds(self) -> float:
        """User and system time since its start."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    async def __aenter__(self) -> Swarm:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "bench.control_plane.swarm_process", str(self._topology), str(self.workers),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
            )  # fmt: skip
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def ask(self, command: Command) -> Told:
        """Raises `LaunchError` if the process ends, or does not answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(command) + b"\n")
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), ANSWER_SECONDS)
        except asyncio.TimeoutError:
            line = b""
        if not line:
            raise LaunchError(f"the simulated workers ended, or did not answer:\n{self._log.read_text()[-4000:]}")
        return msgspec.json.decode(line, type=Told)

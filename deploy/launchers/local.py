"""Processes of this machine. They can't outlive us: not a stop, not a crash, not a kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.errors import LaunchError
from cluster.process import die_with_parent
from deploy.gpus import GpuDealer
from deploy.launchers.processes import ProcessExit, ProcessSpec, ProcessStatus
from deploy.log_files import log_file, tail

_NO_VARIABLES: Mapping[str, str] = {}


class _Life(NamedTuple):
    process: asyncio.subprocess.Process
    started_ns: int
    watching: asyncio.Task[None]


class LocalProcesses:
    """A `ProcessRunner`. Each process has a session of its own, so that a terminal's Ctrl-C reaches us alone and the
    order of the stop is ours; what it prints goes to NAME.log in `directory`."""

    def __init__(
        self,
        directory: Path,
        common: Sequence[str] = (),
        environment: Mapping[str, str] = _NO_VARIABLES,
        exits: asyncio.Queue[ProcessExit] | None = None,
        gpus: GpuDealer | None = None,
    ) -> None:
        """`common`: arguments of every process, before its own; `environment`: variables beside our own; `exits`: where
        to tell of ends, for one who has further processes elsewhere; `gpus`: who says which ones a process sees."""
        self._directory = directory
        self._common = common
        self._gpus = gpus
        # PYTHONSAFEPATH (Python 3.11): a folder named "router" where the user stands must not hide our module.
        self._environment = {**os.environ, "PYTHONSAFEPATH": "1", **environment}
        self._lives: dict[str, _Life] = {}
        self._stopping: set[str] = set()
        self._exits: asyncio.Queue[ProcessExit] = exits or asyncio.Queue()

    async def start(self, process: ProcessSpec) -> None:
        try:
            # What a former life wrote says why there is a new one.
            with log_file(self._directory, process.name).open("ab" if process.name in self._lives else "wb") as log:
                started_ns = time.time_ns()
                child = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    process.module,
                    *self._common,
                    *process.arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    env={**self._environment, **({} if self._gpus is None else self._gpus.variables(process))},
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
        except OSError as error:
            raise LaunchError(f"{process.name} can't be started: {error}") from error
        self._stopping.discard(process.name)
        watching = asyncio.create_task(self._watch(process.name, child))
        self._lives[process.name] = _Life(child, started_ns, watching)

    async def stop(self, names: Sequence[str], grace_seconds: float) -> None:
        self._stopping.update(names)
        lives = [self._lives[name] for name in names if name in self._lives]
        for life in lives:
            if life.process.returncode is None:
                life.process.send_signal(signal.SIGTERM)
        if lives:
            await asyncio.wait([life.watching for life in lives], timeout=grace_seconds)
        for life in lives:
            if not life.watching.done():
                _kill_group(life.process.pid)
        if lives:
            await asyncio.wait([life.watching for life in lives])
        if self._gpus is not None:
            self._gpus.take_back(names)

    async def next_exit(self) -> ProcessExit:
        return await self._exits.get()

    def status(self) -> list[ProcessStatus]:
        return [
            ProcessStatus(
                name,
                running=life.process.returncode is None,
                log=str(log_file(self._directory, name)),
                instance=f"{life.process.pid}@{life.started_ns}",
                node=socket.gethostname(),
                started_ns=life.started_ns,
            )
            for name, life in self._lives.items()
        ]

    def log_tail(self, name: str, lines: int) -> list[str]:
        return tail(log_file(self._directory, name), lines)

    async def _watch(self, name: str, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        # Its engine process and whatever else it has started go with it; its session is the group.
        _kill_group(process.pid)
        if name not in self._stopping:
            self._exits.put_nowait(ProcessExit(name, code))


def _kill_group(leader: int) -> None:
    # All gone is fine; PermissionError is macOS's word for a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)

"""Processes of this machine. They can't outlive us: not a stop, not a crash, not a kill -9."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import LaunchError
from cluster.process import die_with_parent
from deploy.launchers.processes import ProcessExit, ProcessSpec, ProcessStatus

_TAIL_BYTES = 64 * 1024


class LocalProcesses:
    """A `ProcessRunner`. Each process has a session of its own, so that a terminal's Ctrl-C reaches us alone and the
    order of the stop is ours; what it prints goes to NAME.log in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._watching: dict[str, asyncio.Task[None]] = {}
        self._stopping: set[str] = set()
        self._exits: asyncio.Queue[ProcessExit] = asyncio.Queue()

    async def start(self, process: ProcessSpec) -> None:
        # PYTHONSAFEPATH (Python 3.11): a folder named "router" where the user stands must not hide our module.
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        try:
            # What a former life wrote says why there is a new one.
            with self._log(process.name).open("ab" if process.name in self._processes else "wb") as log:
                child = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    process.module,
                    *process.arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=asyncio.subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=die_with_parent,
                )
        except OSError as error:
            raise LaunchError(f"{process.name} can't be started: {error}") from error
        self._stopping.discard(process.name)
        self._processes[process.name] = child
        self._watching[process.name] = asyncio.create_task(self._watch(process.name, child))

    async def stop(self, names: Sequence[str], grace_seconds: float) -> None:
        self._stopping.update(names)
        running = {name: self._watching[name] for name in names if name in self._watching}
        for name in running:
            self._signal(name, signal.SIGTERM)
        if running:
            await asyncio.wait(running.values(), timeout=grace_seconds)
        for name, watching in running.items():
            if not watching.done():
                _kill_group(self._processes[name].pid)
        if running:
            await asyncio.wait(running.values())

    async def next_exit(self) -> ProcessExit:
        return await self._exits.get()

    def status(self) -> list[ProcessStatus]:
        return [
            ProcessStatus(name, running=process.returncode is None, log=str(self._log(name)))
            for name, process in self._processes.items()
        ]

    def log_tail(self, name: str, lines: int) -> list[str]:
        with self._log(name).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()[-lines:]

    async def _watch(self, name: str, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        # Its engine process and whatever else it has started go with it; its session is the group.
        _kill_group(process.pid)
        if name not in self._stopping:
            self._exits.put_nowait(ProcessExit(name, code))

    def _signal(self, name: str, number: signal.Signals) -> None:
        process = self._processes[name]
        if process.returncode is None:
            process.send_signal(number)

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"


def _kill_group(leader: int) -> None:
    # All gone is fine; PermissionError is macOS's word for a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)

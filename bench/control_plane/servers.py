"""Bootstrap and a router as processes of their own, and what they cost."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path
from types import TracebackType

import msgspec
import psutil

from cluster.errors import LaunchError

STOP_SECONDS = 20.0


class _LogLine(msgspec.Struct):
    """Of a line of our logs, what is looked at."""

    ts: str
    event: str
    worker: str = ""


class Cost(msgspec.Struct, frozen=True):
    """Of one process, up to a moment."""

    cpu_seconds: float
    """User and system time since its start."""
    resident_bytes: int


class ServerProcess:
    """`python -m MODULE --topology FILE`; a context manager that leaves no process behind. May be started anew."""

    def __init__(self, module: str, topology: Path, log: Path) -> None:
        self._command = [sys.executable, "-m", module, "--topology", str(topology)]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Its log is continued."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def kill(self) -> None:
        """Without last words, as a machine that fails."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def cost(self) -> Cost:
        """Raises `LaunchError` if it has ended."""
        if self._process is None or self._process.poll() is not None:
            raise LaunchError(f"a process has ended:\n{self._log.read_text()[-4000:]}")
        process = psutil.Process(self._process.pid)
        times = process.cpu_times()
        return Cost(times.user + times.system, process.memory_info().rss)

    def logged_at(self, event: str, worker: str, since: float) -> float | None:
        """When the first such line since then was written, in seconds since 1970; None if there is none yet."""
        for line in self._log.read_bytes().splitlines():
            try:
                found = msgspec.json.decode(line, type=_LogLine)
            except msgspec.DecodeError:
                continue
            if found.event == event and found.worker == worker:
                at = datetime.fromisoformat(found.ts.replace("Z", "+00:00")).timestamp()
                if at >= since:
                    return at
        return None

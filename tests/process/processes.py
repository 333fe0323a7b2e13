"""The processes of a cluster started one by one, for tests that end some of them. `baton up` would end them all."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench.cluster import Workers, free_ports, get, get_workers

START_SECONDS = 90.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.05
TAIL_LINES = 40


class Processes:
    """Starts and ends single processes of one cluster; `close` leaves none behind."""

    def __init__(
        self, topology: Path, log_dir: Path, settings: Sequence[str] = (), start_seconds: float = START_SECONDS
    ) -> None:
        self._start_seconds = start_seconds
        router, bootstrap = free_ports(2)
        self.url = f"http://127.0.0.1:{router}"
        self.bootstrap_url = f"http://127.0.0.1:{bootstrap}"
        self.log_dir = log_dir
        self._common = ["--topology", str(topology)]
        for setting in (f"router.port={router}", f"bootstrap.port={bootstrap}", *settings):
            self._common += ["--set", setting]
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *settings: str) -> None:
        """Starts "bootstrap", "router", "prefill-0", "decode-1", ... A name may be started again after its end."""
        module, _, index = name.partition("-")
        command = [sys.executable, "-m", f"{module}_worker" if index else module, *self._common]
        command += ["--index", index] if index else []
        for setting in settings:
            command += ["--set", setting]
        with (self.log_dir / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def running(self, name: str) -> bool:
        return name in self._running

    def kill(self, name: str) -> None:
        """SIGKILL, no last words. Returns when it is gone."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def engine(self, name: str) -> psutil.Process:
        """A worker's engine process."""
        (child,) = psutil.Process(self._running[name].pid).children()
        return child

    def engines(self, name: str) -> list[psutil.Process]:
        """A worker's engine processes, in the order of their ranks."""
        return sorted(psutil.Process(self._running[name].pid).children(), key=lambda child: child.pid)

    def epoch(self, name: str) -> int | None:
        """Of a worker that is ready; None for one that is not there, or not ready."""
        found = {status.member.worker: status for status in self.workers().workers}
        return found[name].member.epoch if name in found and found[name].load.ready else None

    def terminate(self, name: str) -> int:
        """SIGTERM. Returns the exit code."""
        process = self._running.pop(name)
        process.terminate()
        return process.wait(STOP_SECONDS)

    def wait_workers(self, *names: str) -> None:
        """Until bootstrap knows exactly these workers."""
        self._wait(lambda: {status.member.worker for status in self.workers().workers} == set(names), f"{names}")

    def wait_healthy(self) -> None:
        """Until the router takes requests."""
        self._wait(lambda: get(f"{self.url}/health") is not None, "a healthy router")

    def wait_log(self, name: str, *words: str) -> str:
        """Until one line of the process's log has all `words`; returns it."""
        self._wait(lambda: self._line(name, words) is not None, f"a line with {words} in the log of {name}")
        return self._line(name, words) or ""

    def workers(self) -> Workers:
        return get_workers(self.bootstrap_url)

    def tail(self) -> str:
        """The last lines of all logs, for the report of a failure."""
        texts = []
        for path in sorted(self.log_dir.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            texts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(texts)

    def close(self) -> None:
        trees = [psutil.Process(process.pid) for process in self._running.values() if process.poll() is None]
        everything = [member for tree in trees for member in (tree, *tree.children(recursive=True))]
        for process in self._running.values():
            process.terminate()
        psutil.wait_procs(everything, timeout=STOP_SECONDS)
        for member in everything:
            if member.is_running():
                member.kill()
        for process in self._running.values():
            process.wait()

    def _line(self, name: str, words: Sequence[str]) -> str | None:
        lines = (self.log_dir / f"{name}.log").read_text(errors="replace").splitlines()
        return next((line for line in lines if all(word in line for word in words)), None)

    def _wait(self, condition, what: str) -> None:
        deadline = time.monotonic() + self._start_seconds
        while not _holds(condition):
            ended = {name: code for name, each in self._running.items() if (code := each.poll()) is not None}
            assert not ended, f"waiting for {what}: ended with {ended}\n{self.tail()}"
            assert time.monotonic() < deadline, f"not within {self._start_seconds:g} s: {what}\n{self.tail()}"
            time.sleep(POLL_SECONDS)


def _holds(condition) -> bool:
    """A server that does not answer yet does not fulfil it."""
    try:
        return condition()
    except OSError:
        return False

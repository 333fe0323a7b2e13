"""A cluster to be measured: `baton up` as a subprocess on free ports, watched over HTTP. All calls block."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec

from bench.processes import ProcessTree
from cluster.errors import LaunchError
from cluster.messages import MemberStatus, Role
from cluster.topology import load_topology

READY_SECONDS = 900.0
"""On a GPU the first start compiles kernels; `baton up` itself tells of what can't start."""
STOP_SECONDS = 40.0
POLL_SECONDS = 0.1
HTTP_SECONDS = 5.0
TAIL_LINES = 40


class Workers(msgspec.Struct, frozen=True):
    """The reply of bootstrap's `GET /workers`."""

    workers: list[MemberStatus]

    @property
    def idle(self) -> bool:
        """Whether every ledger is at zero: nothing queued, running, in transfer, owned or in quarantine."""
        return all(
            not any((load.queued, load.running, load.transfers, load.pages_used, load.pages_quarantined))
            and not any(load.owners.values())
            for load in (status.load for status in self.workers)
        )


class Cluster:
    """One topology, run by `baton up`; a context manager that leaves no process behind."""

    def __init__(self, topology: Path, settings: Sequence[str], log_dir: Path) -> None:
        """`settings` are further `--set` values, after those of the free ports. Raises `ConfigError`."""
        router, bootstrap = free_ports(2)
        self.url = f"http://127.0.0.1:{router}"
        self.bootstrap_url = f"http://127.0.0.1:{bootstrap}"
        self.log_dir = log_dir
        self._topology = topology
        self._settings = (f"router.port={router}", f"bootstrap.port={bootstrap}", *settings)
        resolved = load_topology(topology, self._settings)
        self._workers = resolved.prefill.replicas + resolved.decode.replicas
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        chosen = [word for setting in self._settings for word in ("--set", setting)]
        return ["-m", "deploy.cli", "up", str(self._topology), "--log-dir", str(self.log_dir), *chosen]

    @property
    def output(self) -> Path:
        """What `baton up` itself prints."""
        return self.log_dir / "up.out"

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            if self._process is not None:
                self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the router is healthy and all workers are there. Raises `LaunchError`, with the launcher's last
        words, if that does not come to be."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        with self.output.open("wb") as output:
            self._process = subprocess.Popen([sys.executable, *self.command], stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + READY_SECONDS
        while not self._complete():
            if self._process.poll() is not None:
                raise LaunchError(f"`baton up` ended with {self._process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise LaunchError(f"the cluster is not up after {READY_SECONDS:g} s:\n{self.tail()}")
            time.sleep(POLL_SECONDS)

    def stop(self) -> int:
        """Asks `baton up` to end, kills it (and so its children, who die with it) if it does not. Returns its exit
        code; stopping twice is fine."""
        if self._process is None:
            raise LaunchError("the cluster was never started")
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return self._process.returncode

    @property
    def tree(self) -> ProcessTree:
        """The running processes."""
        if self._process is None:
            raise LaunchError("the cluster was never started")
        return ProcessTree(self._process.pid)

    def workers(self) -> list[MemberStatus]:
        return get_workers(self.bootstrap_url).workers

    def wait_idle(self, seconds: float = 20.0) -> None:
        """Until a heartbeat of every worker, sent from now on, says that its ledgers are at zero. Raises `LaunchError`
        with what is still held."""
        deadline = time.monotonic() + seconds
        begun = time.monotonic()
        while True:
            found = get_workers(self.bootstrap_url)
            now = time.monotonic()
            # Older heartbeats may be from before the work whose end is waited for.
            if found.idle and all(status.age_seconds < now - begun for status in found.workers):
                return
            if now > deadline:
                loads = {status.member.worker: msgspec.to_builtins(status.load) for status in found.workers}
                raise LaunchError(f"not idle after {seconds:g} s: {loads}")
            time.sleep(POLL_SECONDS)

    def worker_urls(self, role: Role) -> list[str]:
        return [status.member.url for status in self.workers() if status.member.role is role]

    def tail(self) -> str:
        """The last lines of all logs."""
        texts = []
        for path in sorted({self.output, *self.log_dir.glob("*.log")}):
            lines = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            texts.append("\n".join([f"--- {path.name}", *lines]))
        return "\n".join(texts)

    def _complete(self) -> bool:
        try:
            get(f"{self.url}/health")
            return len(self.workers()) == self._workers
        except OSError:
            return False


def get(url: str) -> bytes:
    """The body of a 200. Raises `urllib.error.URLError`, an OSError, for all else."""
    with urllib.request.urlopen(url, timeout=HTTP_SECONDS) as response:
        body: bytes = response.read()
    return body


def get_workers(bootstrap_url: str) -> Workers:
    return msgspec.json.decode(get(f"{bootstrap_url}/workers"), type=Workers)


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()

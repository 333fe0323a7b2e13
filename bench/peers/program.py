"""A peer that is one program with an environment of its own: it listens on a port, and is up when it says so."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil

from bench.cluster import free_ports, get
from bench.peers.base import Card, Endpoint, shown
from bench.processes import ProcessTree
from cluster.errors import ConfigError, LaunchError
from cluster.process import die_with_parent

PORT = "PORT"
"""Stands for the port in a command."""
READY_SECONDS = 300.0
"""vLLM compiles the model when it first meets it."""
KILL_SECONDS = 5.0
POLL_SECONDS = 0.1
TAIL_LINES = 40


@dataclass(frozen=True)
class Program:
    """Implements `Peer`."""

    name: str
    environment: Path
    """The virtual environment that it is installed in."""
    packages: Sequence[str]
    """Those whose versions matter."""
    variables: Mapping[str, str]
    command: Sequence[str]
    needs: Sequence[Path]
    """Files without which it can't run."""
    model: str
    options: Mapping[str, Any]
    """Of each request."""
    takes_text: bool = False
    says_done: bool = True
    stop_seconds: float = 20.0
    """So long it may take to end when asked to."""

    @property
    def words(self) -> list[str]:
        """The command with its variables, as a shell would take it."""
        return ["env", *(f"{name}={value}" for name, value in self.variables.items()), *self.command]

    @property
    def card(self) -> Card:
        return Card(self.name, shown(self.words), installed(self.environment, self.packages))

    def check(self) -> None:
        missing = [path for path in (Path(self.command[0]), *self.needs) if not path.exists()]
        if missing:
            raise ConfigError(f"{self.name} can't take part: there is no {missing[0]}; run `make peers`")

    @contextmanager
    def serve(self, log_dir: Path) -> Iterator[Endpoint]:
        log_dir.mkdir(parents=True, exist_ok=True)
        log = log_dir / f"{self.name}.log"
        port = free_ports(1)[0]
        words = [word.replace(PORT, str(port)) for word in self.words]
        url = f"http://127.0.0.1:{port}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                words, stdout=output, stderr=subprocess.STDOUT, cwd=log_dir, preexec_fn=die_with_parent
            )
        try:
            _wait_until_up(process, f"{url}/health", log)
            yield Endpoint(url, self.model, self.options, ProcessTree(process.pid), self.takes_text, self.says_done)
        finally:
            end_tree(process, self.stop_seconds)


def installed(environment: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that a virtual environment has."""
    folders = [str(folder) for folder in environment.glob("lib/python*/site-packages")]
    found = {each.metadata["Name"]: each.version for each in distributions(path=folders)}
    return {name: found[name] for name in packages if name in found}


def end_tree(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Asks `process` to end; kills what is left of it and of its children after so long. Returns when all are gone."""
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, stubborn = psutil.wait_procs([psutil.Process(process.pid), *children], timeout=seconds)
        for each in stubborn:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(stubborn, timeout=KILL_SECONDS)
    process.wait()


def _wait_until_up(process: subprocess.Popen[bytes], health_url: str, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        with suppress(OSError):
            get(health_url)
            return
        if process.poll() is not None:
            raise LaunchError(f"{log.stem} ended with {process.returncode}:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise LaunchError(f"{log.stem} is not up after {READY_SECONDS:g} s:\n{_tail(log)}")
        time.sleep(POLL_SECONDS)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])

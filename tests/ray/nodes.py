"""A Ray cluster of two nodes on this machine, with addresses of their own; nothing of it outlives the tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench.cluster import free_ports

START_SECONDS = 120.0
POLL_SECONDS = 0.1
SECOND_ADDRESS = "127.0.0.2"
"""Of the second node: what listens there is not found at 127.0.0.1."""
OBJECT_STORE_BYTES = 80 * 1024 * 1024

_RAY = Path(sys.executable).parent / "ray"


class RayNodes:
    """`start`, then `close` in any case. Never `ray stop`: that would end every Ray of the machine."""

    def __init__(self) -> None:
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # paths of sockets must be short
        self._port = port
        self._commands: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        head = ("--head", f"--port={self._port}", "--include-dashboard=false", f"--temp-dir={self.folder}")
        self._start("head", (*head, "--node-ip-address=127.0.0.1", "--num-gpus=2"))
        self.start_second()

    def start_second(self) -> None:
        """Also once more, after its end."""
        if "second" in self._commands:
            _end_group(self._commands["second"])
        resources = json.dumps({"second": 8})
        join = (f"--address={self.address}", f"--node-ip-address={SECOND_ADDRESS}", f"--resources={resources}")
        self._start("second", join)

    def kill_second(self) -> None:
        """SIGKILL for its raylet, the node itself: no farewell to anybody."""
        for child in psutil.Process(self._commands["second"].pid).children():
            if child.name().startswith("raylet"):
                child.kill()
                return
        raise AssertionError("the second node has no raylet")

    def close(self) -> None:
        for command in reversed(self._commands.values()):
            _end_group(command)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, arguments: Sequence[str]) -> None:
        common = ("--block", "--num-cpus=16", "--disable-usage-stats", f"--object-store-memory={OBJECT_STORE_BYTES}")
        output = self.folder / f"{name}.out"
        with output.open("wb") as out:
            command = [str(_RAY), "start", *arguments, *common]
            # `--block` keeps Ray's processes below the command; they have its session, so that all are found again.
            self._commands[name] = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=os.environ, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in output.read_bytes():
            assert self._commands[name].poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(POLL_SECONDS)


def _end_group(command: subprocess.Popen[bytes]) -> None:
    """Ends what `ray start` has started: all of its session, for some of them have groups of their own."""
    found = [process for process in psutil.process_iter() if _session(process.pid) == command.pid]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(found, timeout=10)
    command.wait()


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None

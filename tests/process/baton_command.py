"""The `baton` command as a user runs it, with stand-ins (see stand_ins/) for the processes that it starts."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path

import psutil

BATON = Path(sys.executable).parent / "baton"
STAND_INS = Path(__file__).parent / "stand_ins"
PATIENCE = 60.0


def _hear_interrupts() -> None:
    """As a command of a terminal: shells let what they run in the background ignore Ctrl-C, and all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Baton:
    """One `baton` command, working in a folder of its own."""

    def __init__(self, directory: Path, python_path: str = str(STAND_INS)) -> None:
        """`python_path` is where modules are looked for before ours."""
        self.directory = directory
        self._python_path = python_path
        self.run_directory = directory / "run"
        self.output = ""
        (directory / "tiny.gguf").write_bytes(b"GGUF")
        (directory / "t.yaml").write_text(
            "model: {path: tiny.gguf}\nbootstrap: {port: 0}\nrouter: {port: 0}\ndecode: {replicas: 2}\n"
        )

    async def start(self, *arguments: str, **behaviours: str) -> None:
        stand_ins = {name.replace("_", "-"): behaviour for name, behaviour in behaviours.items()}
        self.process = await asyncio.create_subprocess_exec(
            BATON,
            *arguments,
            cwd=self.directory,
            env={**os.environ, "PYTHONPATH": self._python_path, "BATON_STAND_IN": json.dumps(stand_ins)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            preexec_fn=_hear_interrupts,
        )

    async def up(self, *settings: str, **behaviours: str) -> None:
        chosen = [word for setting in settings for word in ("--set", setting)]
        await self.start("up", "t.yaml", "--log-dir", "run", *chosen, **behaviours)

    async def says(self, text: str) -> None:
        while text not in self.output:
            line = await asyncio.wait_for(self.process.stdout.readline(), PATIENCE)
            assert line, f"ended without saying {text!r}:\n{self.output}"
            self.output += line.decode()

    async def ends(self) -> int:
        rest = await asyncio.wait_for(self.process.stdout.read(), PATIENCE)
        self.output += rest.decode()
        return await asyncio.wait_for(self.process.wait(), PATIENCE)

    @property
    def url(self) -> str:
        """Of the router of a cluster that is ready."""
        found = re.search(r"ready: .* at (\S+) ", self.output)
        assert found is not None, self.output
        return found[1]

    def pid(self, name: str) -> int:
        return int((self.run_directory / f"{name}.pid").read_text())

    async def successor(self, name: str, pid: int) -> int:
        """The process that has taken the place of `pid`, once it runs."""

        async def found() -> int:
            while (now := (self.run_directory / f"{name}.pid").read_text()) in ("", str(pid)):  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.01)
            return int(now)

        return await asyncio.wait_for(found(), PATIENCE)

    def left_over(self) -> list[str]:
        """Names of the processes that still run; a dead one that nobody has buried does not."""
        return [file.stem for file in self.run_directory.glob("*.pid") if _runs(int(file.read_text()))]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

"""A transfer engine without Baton: two processes, one of which writes pages into the other's memory.

Here is the parent's half, `BareEnd`, one for each process; `bench.handoff.bare_process` is the other half.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from types import TracebackType
from typing import Any, NamedTuple

from bench.handoff.engines import Remote
from cluster.config import TransferName
from cluster.errors import LaunchError

ANSWER_SECONDS = 60.0
WARM_UP = 3
"""Writes that are not counted: the first one finishes the connection."""


class Start(NamedTuple):
    """First message to an end; answered by its `Remote`."""

    transfer: TransferName
    pages: int
    page_bytes: int
    cores: Sequence[int]
    fill: int = 0
    """The value of each byte of its pool."""


class Write(NamedTuple):
    """Answered by the seconds that it took."""

    sources: Sequence[int]
    targets: Sequence[int]


class Count(NamedTuple):
    """Answered by how many of these pages have this value in each byte."""

    pages: Sequence[int]
    fill: int


class BareEnd:
    """A process with a pool and an engine; a context manager that leaves no process behind. All calls block, and raise
    `LaunchError` if the process ends."""

    def __init__(self, start: Start, environment: Mapping[str, str]) -> None:
        self._start = start
        self._environment = dict(environment)
        # Mooncake has much to say in normal use; it is of interest only when something went wrong.
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process

    def __enter__(self) -> BareEnd:
        self._link, theirs = Pipe()
        with theirs:
            fd = theirs.fileno()
            command = [sys.executable, "-m", "bench.handoff.bare_process", str(fd)]
            self._process = subprocess.Popen(command, env=self._environment, pass_fds=[fd], stderr=self._said)
        try:
            self._link.send(self._start)
            self.remote: Remote = self._answer()
        except LaunchError:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def connect(self, remote: Remote) -> None:
        self._link.send(remote)
        self._answer()

    def write(self, sources: Sequence[int], targets: Sequence[int]) -> float:
        """Seconds, by the clock of the process that writes."""
        self._link.send(Write(sources, targets))
        seconds: float = self._answer()
        return seconds

    def count(self, pages: Sequence[int], fill: int) -> int:
        self._link.send(Count(pages, fill))
        found: int = self._answer()
        return found

    def _close(self) -> None:
        """The process ends when its connection does."""
        self._link.close()
        try:
            self._process.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def _answer(self) -> Any:
        try:
            if self._link.poll(ANSWER_SECONDS):
                return self._link.recv()
        except (EOFError, ConnectionError):
            pass
        self._said.seek(0)
        words = self._said.read().decode(errors="replace")
        raise LaunchError(f"a bare transfer engine ended, or did not answer within {ANSWER_SECONDS:g} s:\n{words}")


def measure_bare(
    writer: Start, reader: Start, batches: Sequence[int], repeats: int, environment: Mapping[str, str], seed: int = 0
) -> list[float]:
    """Seconds for one handoff of so many pages a batch, one batch after the other, each page from a random place to a
    random place; for each of `repeats` handoffs. Raises `LaunchError`, also if the last one's bytes are not there."""
    draw = random.Random(seed)
    taken = []
    reader, writer = reader._replace(fill=1), writer._replace(fill=2)
    with BareEnd(reader, environment) as target, BareEnd(writer, environment) as source:
        source.connect(target.remote)
        for _ in range(WARM_UP + repeats):
            sources = draw.sample(range(writer.pages), sum(batches))
            targets = draw.sample(range(reader.pages), sum(batches))
            seconds, begin = 0.0, 0
            for pages in batches:
                seconds += source.write(sources[begin : begin + pages], targets[begin : begin + pages])
                begin += pages
            taken.append(seconds)
        landed = target.count(targets, writer.fill)
    if landed != len(targets):
        raise LaunchError(f"{writer.transfer.value} has written {landed} of {len(targets)} pages")
    return taken[WARM_UP:]

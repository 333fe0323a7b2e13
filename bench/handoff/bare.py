"""A transfer engine without Baton: two processes, one of which writes pages into the other's memory.

The parent's half is `BareEnd`, one for each process; `python -m bench.handoff.bare FD` is the other half. Memory is
touched beforehand and descriptors are prepared as far as the engine can: what is timed is the way of the bytes.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from bench.handoff.engines import Pool, Remote, open_engine
from cluster.config import TransferName
from cluster.errors import LaunchError

ANSWER_SECONDS = 60.0
PROGRESS_SECONDS = 1e-3
"""Between two looks at an engine that may be written to."""
WARM_UP = 3
"""Writes that are not counted: the first one finishes the connection."""


class Start(NamedTuple):
    """First message to an end; answered by its `Remote`."""

    transfer: TransferName
    pages: int
    page_bytes: int
    cores: Sequence[int]


class Write(NamedTuple):
    """Answered by the seconds that it took."""

    sources: Sequence[int]
    targets: Sequence[int]


class BareEnd:
    """A process with a pool and an engine; a context manager that leaves no process behind. All calls block, and raise
    `LaunchError` if the process ends."""

    def __init__(self, start: Start, environment: Mapping[str, str]) -> None:
        self._link, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", "bench.handoff.bare", str(theirs.fileno())]
            self._process = subprocess.Popen(command, env=dict(environment), pass_fds=[theirs.fileno()])
        self._link.send(start)
        self.remote: Remote = self._answer()

    def __enter__(self) -> BareEnd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.close()
        try:
            self._process.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def connect(self, remote: Remote) -> None:
        self._link.send(remote)
        self._answer()

    def write(self, sources: Sequence[int], targets: Sequence[int]) -> float:
        """Seconds, by the clock of the process that writes."""
        self._link.send(Write(sources, targets))
        seconds: float = self._answer()
        return seconds

    def _answer(self) -> Any:
        try:
            if self._link.poll(ANSWER_SECONDS):
                return self._link.recv()
        except (EOFError, ConnectionError):
            pass
        raise LaunchError(f"a process with a bare transfer engine ended, or said nothing for {ANSWER_SECONDS:g} s")


def measure_bare(
    writer: Start, reader: Start, batches: Sequence[int], repeats: int, environment: Mapping[str, str], seed: int = 0
) -> list[float]:
    """Seconds for one handoff of so many pages a batch, one batch after the other, each page from a random place to a
    random place; for each of `repeats` handoffs. Raises `LaunchError`."""
    draw = random.Random(seed)
    taken = []
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
    return taken[WARM_UP:]


def _serve(link: Connection) -> None:
    """The process's own half: until the parent closes the connection."""
    start: Start = link.recv()
    if start.cores:
        os.sched_setaffinity(0, start.cores)
    memory = np.ones(start.pages * start.page_bytes, dtype=np.uint8)
    pool = Pool(memory.ctypes.data, start.pages, start.page_bytes)
    engine = open_engine(start.transfer, f"bare-{os.getpid()}", pool)
    link.send(Remote(engine.endpoint, pool))
    while True:
        if not link.poll(PROGRESS_SECONDS):
            engine.progress()
            continue
        try:
            asked = link.recv()
        except EOFError:
            return
        if isinstance(asked, Remote):
            engine.connect(asked)
            link.send(None)
        else:
            begun = time.perf_counter()
            engine.write(asked.sources, asked.targets)
            link.send(time.perf_counter() - begun)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))

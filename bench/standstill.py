"""When the machine itself stood still: a virtual machine gets its cores from a host that lends them to others, too.

A witness waits for short times on every core, in real-time threads, that go before all ordinary ones. When all of them
wake up late at once, nothing could run: no server's fault, and no part of what is compared. What a client saw can then
be told twice: by the wall clock, and by a clock that stands still with the machine.
"""

from __future__ import annotations

import bisect
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from types import TracebackType
from typing import NamedTuple

PERIOD_SECONDS = 0.002
LATE_SECONDS = 0.003
"""Beyond a period. A waking core needs some tens of microseconds."""
REALTIME_PRIORITY = 90

NOTE = (
    "The machine stood still when real-time threads on all of its cores woke up late together: its host had lent the "
    "cores to others. While the machine ran: by a clock that stands still with it"
)

Interval = tuple[float, float]
"""From, to, on the monotonic clock."""


class Standstills:
    """Times at which no core ran, in order and apart. Pure."""

    def __init__(self, intervals: Iterable[Interval]) -> None:
        self.intervals = sorted(intervals)
        self._starts = [start for start, _ in self.intervals]
        self._lost = [0.0, *accumulate(end - start for start, end in self.intervals)]
        """Seconds before the interval of that number."""

    @classmethod
    def of_all(cls, cores: Sequence[Sequence[Interval]]) -> Standstills:
        """Where every core has an interval of its own."""
        if not cores:
            return cls([])
        common = list(cores[0])
        for other in cores[1:]:
            pairs = ((max(a[0], b[0]), min(a[1], b[1])) for a in common for b in other)
            common = [(start, end) for start, end in pairs if start < end]
        return cls(common)

    def running(self, moment: float) -> float:
        """`moment` by a clock that stands still with the machine: that many seconds earlier as were lost before it."""
        number = bisect.bisect_right(self._starts, moment)
        if not number:
            return moment
        return moment - self._lost[number - 1] - (min(moment, self.intervals[number - 1][1]) - self._starts[number - 1])

    @property
    def longest(self) -> float:
        """In seconds; 0 without any."""
        return max((end - start for start, end in self.intervals), default=0.0)

    def within(self, start: float, end: float) -> list[float]:
        """Seconds of each standstill that began in [start, end)."""
        return [stop - begun for begun, stop in self.intervals if start <= begun < end]


class Witness:
    """`with Witness() as witness: ...`; then `witness.standstills`."""

    def __init__(self, cores: Iterable[int] | None = None) -> None:
        self._cores = sorted(os.sched_getaffinity(0) if cores is None else cores)
        self.standstills: Standstills | None = None
        """None before the end, and where real-time threads are not allowed: then nobody can tell."""

    def __enter__(self) -> Witness:
        command = [sys.executable, "-m", "bench.standstill", *map(str, self._cores)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it watches from now on
        return self

    @property
    def pid(self) -> int:
        """Of the process that watches."""
        return self._process.pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        told, _ = self._process.communicate()
        with suppress(ValueError):
            cores = json.loads(told)
            if cores is not None:
                self.standstills = Standstills.of_all([[(start, end) for start, end in core] for core in cores])


class _Core(NamedTuple):
    late: list[Interval]
    refused: list[str]


def watch(core: int, until: threading.Event, seen: _Core) -> None:
    """Runs in a thread of its own, on that core."""
    try:
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(REALTIME_PRIORITY))
    except OSError as error:
        seen.refused.append(str(error))
        return
    before = time.monotonic()
    while not until.is_set():
        time.sleep(PERIOD_SECONDS)
        now = time.monotonic()
        if now - before > PERIOD_SECONDS + LATE_SECONDS:
            seen.late.append((before + PERIOD_SECONDS, now))
        before = now


def main(cores: Sequence[int]) -> None:
    """Watches until its input ends; then prints each core's late times as JSON, or null if it may not watch."""
    seen = [_Core([], []) for _ in cores]
    until = threading.Event()
    threads = [threading.Thread(target=watch, args=(core, until, one)) for core, one in zip(cores, seen, strict=True)]
    for thread in threads:
        thread.start()
    print("watching", flush=True)
    sys.stdin.read()
    until.set()
    for thread in threads:
        thread.join()
    allowed = not any(one.refused for one in seen)
    print(json.dumps([one.late for one in seen] if allowed else None))


if __name__ == "__main__":
    main([int(core) for core in sys.argv[1:]])

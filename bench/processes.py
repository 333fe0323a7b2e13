"""What the processes of a cluster cost: CPU seconds and resident memory, by process."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

import psutil

LAUNCHER = "launcher"


class ProcessTree:
    """A launcher and all that it started. A worker's processes (control, engine) count as its own."""

    def __init__(self, pid: int) -> None:
        self._launcher = psutil.Process(pid)

    def cpu_seconds(self) -> dict[str, float]:
        """User plus system time since each process's start, by member of the cluster. Ended processes are left out."""
        total: dict[str, float] = {}
        for member, process in self._members():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total[member] = total.get(member, 0.0) + times.user + times.system
        return total

    def resident_bytes(self) -> dict[str, int]:
        """Of each single process, named member/pid."""
        found: dict[str, int] = {}
        for member, process in self._members():
            with suppress(psutil.NoSuchProcess):
                found[f"{member}/{process.pid}"] = process.memory_info().rss
        return found

    def proportional_bytes(self) -> int:
        """Memory of the whole tree (Linux): what several processes share counts once."""
        total = 0
        for _, process in self._members():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                total += process.memory_full_info().pss
        return total

    def environment(self, member: str) -> dict[str, str]:
        """What the processes of `member` were started with; where they differ, what the last one has."""
        found: dict[str, str] = {}
        for name, process in self._members():
            if name == member:
                with suppress(psutil.NoSuchProcess):
                    found |= process.environ()
        return found

    def pids(self) -> dict[str, int]:
        """The first process of each member: what the launcher itself started."""
        found = {}
        for child in self._launcher.children():
            with suppress(psutil.NoSuchProcess):
                found[_member_name(child)] = child.pid
        return found

    def _members(self) -> Iterator[tuple[str, psutil.Process]]:
        yield LAUNCHER, self._launcher
        for child in self._launcher.children():
            with suppress(psutil.NoSuchProcess):
                name = _member_name(child)
                yield from ((name, process) for process in (child, *child.children(recursive=True)))


def busy_seconds(cores: Iterable[int]) -> float:
    """Time for which these cores were not idle since the machine's start, whoever used them."""
    times = psutil.cpu_times(percpu=True)
    return float(sum(sum(times[core]) - times[core].idle - times[core].iowait for core in cores))


class Others:
    """What share of some cores' time goes to processes that take no part, from now on."""

    def __init__(self, tree: ProcessTree, cores: Iterable[int]) -> None:
        self._tree = tree
        self._cores = sorted(cores)
        self._begun = time.monotonic()
        self._before = self._spent()

    def share(self) -> float:
        """Since the start; small negative values are the kernel's rounding."""
        return (self._spent() - self._before) / ((time.monotonic() - self._begun) * len(self._cores))

    def _spent(self) -> float:
        return busy_seconds(self._cores) - sum(self._tree.cpu_seconds().values()) - own_seconds()


def own_seconds() -> float:
    """User plus system time of this process."""
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


def _member_name(process: psutil.Process) -> str:
    """From `python -m prefill_worker ... --index 0` to "prefill-0"; other programs by their own name."""
    words: list[str] = process.cmdline()
    if "-m" not in words[:-1]:
        return str(process.name())
    module = words[words.index("-m") + 1].split(".")[0]
    if not module.endswith("_worker"):
        return module
    index = words[words.index("--index") + 1] if "--index" in words[:-1] else "0"
    return f"{module.removesuffix('_worker')}-{index}"

"""What a process does about itself: where it runs, and that it does not outlive its parent."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
from collections.abc import Sequence

EXIT_DONE = 0
"""The process has done what it was to do, or was asked to end."""
EXIT_RESTART = 75
"""It has ended in order, and wants to be started anew: of sysexits.h, "try again"."""

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies (Linux; elsewhere the closed channel has to do)."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        pass


def leave_interrupts_to_parent() -> None:
    """Ctrl-C reaches a terminal's whole process group; a child that its parent stops in order ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def pin(cores: Sequence[int]) -> list[int]:
    """Pins this process to those of `cores` that exist here; if none do, it stays free. Returns what it may run on."""
    available = os.sched_getaffinity(0)
    wanted = available & set(cores)
    if wanted:
        os.sched_setaffinity(0, wanted)
    return sorted(wanted or available)


def allow_open_files(count: int) -> None:
    """Raises this process's own limit of open files to `count`, as far as the system lets it: a shell's usual 1,024 are
    fewer than the connections that a router takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def forget_garbage() -> None:
    """What is alive now stays alive: the collector need not look at it again. Called when a process has started: with
    all that torch brings, or a tokenizer, a full collection takes a tenth of a second, in which no token is made or
    passed on."""
    gc.collect()
    gc.freeze()

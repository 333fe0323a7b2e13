"""Which process this is, and whether another process of this host is dead for certain.

The only question is "can it still write into my memory?". So `is_dead` says True on the kernel's word alone; a process
of another host, of another pid namespace, or one that we may not look at, is never called dead.
"""

from __future__ import annotations

import os
from pathlib import Path

from cluster.messages import ProcessIdentity

_PROC = Path("/proc")
_STATE, _THREADS, _START = 0, 17, 19
"""Positions in /proc/PID/stat after the command's closing parenthesis; see proc(5), fields 3, 20 and 22."""


def current() -> ProcessIdentity:
    """The calling process. Linux only: reads /proc."""
    return ProcessIdentity(
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        pid=os.getpid(),
        start_ticks=int(_stat(os.getpid())[_START]),
    )


def is_dead(identity: ProcessIdentity) -> bool:
    """True only with proof; False means alive or unknown. A zombie without living threads counts as dead."""
    if identity.boot_id != _boot_id() or identity.pid_namespace != _pid_namespace():
        return False
    try:
        os.kill(identity.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        stat = _stat(identity.pid)
    except OSError:  # gone in between, or hidden from us: the next call will know
        return False
    if int(stat[_START]) != identity.start_ticks:
        return True
    # The leader of a process turns zombie before its last threads have left the kernel, and with them their writes.
    return stat[_STATE] in "ZX" and int(stat[_THREADS]) <= 1


def same_view(one: ProcessIdentity, other: ProcessIdentity) -> bool:
    """Whether the two run on one boot of one host, in one pid namespace: each can ask its kernel about the other."""
    return (one.boot_id, one.pid_namespace) == (other.boot_id, other.pid_namespace)


def _stat(pid: int) -> list[str]:
    """The fields after the command, which may itself hold spaces and parentheses."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _boot_id() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> str:
    return str((_PROC / "self/ns/pid").readlink())

"""Another process's TCP sockets, taken hold of from outside: cut, or made deaf and healed. Linux; needs no privilege
but that of tracing the process (one's own children, where the kernel is strict).

A descriptor is copied by pidfd_getfd(2). `shutdown` on the copy ends the connection itself. A socket filter that keeps
nothing lets no segment reach TCP: no data, no acknowledgement, no reset; that is a cable that is pulled, and put back.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import psutil

_PIDFD_GETFD = 438
"""The same on all architectures."""
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_RETURN = 0x06
"""BPF_RET | BPF_K: keep k bytes of the packet."""

Address = tuple[str, int]


class Connection(NamedTuple):
    """One TCP socket of a process; `remote` is None where it listens."""

    pid: int
    descriptor: int
    local: Address
    remote: Address | None


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def connections(pids: Iterable[int]) -> list[Connection]:
    """All open TCP sockets of these processes; those that are gone meanwhile have none."""
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for each in psutil.Process(pid).net_connections(kind="tcp"):
                if each.fd >= 0:
                    remote = (each.raddr.ip, each.raddr.port) if each.raddr else None
                    found.append(Connection(pid, each.fd, (each.laddr.ip, each.laddr.port), remote))
    return found


def other_ends(ends: Iterable[Connection], among: Iterable[Connection]) -> list[Connection]:
    """Of those `among`, the ones that are connected to one of `ends`."""
    wanted = {(each.remote, each.local) for each in ends if each.remote is not None}
    return [each for each in among if (each.local, each.remote) in wanted]


def cut(ends: Iterable[Connection]) -> int:
    """Ends these connections, for both sides; those that listen stay. Returns how many there were."""
    return sum(_each(each, lambda found: found.shutdown(socket.SHUT_RDWR)) for each in ends if each.remote is not None)


def deafen(ends: Iterable[Connection]) -> int:
    """From now on nothing arrives there: on connections, nor, where one listens, from who connects."""
    instruction = _Instruction(_RETURN, 0, 0, 0)
    program = bytes(_Program(1, ctypes.pointer(instruction)))
    return sum(_each(each, lambda found: _set_option(found, _SO_ATTACH_FILTER, program)) for each in ends)


def heal(ends: Iterable[Connection]) -> int:
    """Undoes `deafen`."""
    return sum(_each(each, lambda found: _set_option(found, _SO_DETACH_FILTER, 0)) for each in ends)


def _set_option(found: socket.socket, option: int, value: Any) -> None:
    found.setsockopt(socket.SOL_SOCKET, option, value)


def _each(end: Connection, act: Callable[[socket.socket], None]) -> bool:
    """False if the socket has closed meanwhile, or there is nothing to undo."""
    try:
        with _copied(end) as found:
            act(found)
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ESRCH, errno.ENOTCONN, errno.ENOENT, errno.ENOTSOCK):
            return False
        raise
    return True


@contextmanager
def _copied(end: Connection) -> Iterator[socket.socket]:
    process = os.pidfd_open(end.pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        copy = libc.syscall(_PIDFD_GETFD, process, end.descriptor, 0)
        if copy < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(process)
    with socket.socket(fileno=copy) as found:
        # The descriptor may mean another socket by now.
        if found.getsockname()[:2] == end.local:
            yield found
        else:
            raise OSError(errno.EBADF, "another socket by now")

"""An end to TCP connections that a transfer engine has opened in this process, now or when the process ends.

Engines offer no way to them, so they are looked for among the process's open files; that takes about 60 microseconds.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Collection
from contextlib import suppress

Address = tuple[str, int]
"""Host in numbers, and port."""

_RESET_AT_CLOSE = struct.pack("ii", 1, 0)
"""struct linger {l_onoff, l_linger}; see socket(7)."""


def drop_unsent_on_close() -> None:
    """Has each TCP connection of this process end by a reset instead of by its last bytes.

    Else the kernel goes on sending what it has taken: to a peer that was stopped, 7 MB landed after the writer had been
    killed, and without this 8 MB after NIXL's agent was gone. It holds for SIGKILL, too: it is the kernel that closes.
    Call it once they are connected.
    """
    _for_each(lambda found: found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE))


def hang_up(port: int, peers: Collection[Address] = ()) -> None:
    """Ends what this process has at its own `port`, listening or accepted, and what it has opened to `peers`. Whoever
    waits for any of them, in whatever library, is told so at once."""

    def end(found: socket.socket) -> None:
        if found.getsockname()[1] == port or (peers and found.getpeername()[:2] in peers):
            found.shutdown(socket.SHUT_RDWR)

    _for_each(end)


def addresses(host: str, port: int) -> frozenset[Address]:
    """Of a name or number; may ask a name server. Empty if there are none."""
    with suppress(OSError):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return frozenset((str(address[0]), port) for *_, address in found)
    return frozenset()


def _for_each(act: Callable[[socket.socket], None]) -> None:
    """Calls it with each TCP socket; those that are gone meanwhile, or not connected, are passed over."""
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names, not paths
        try:
            found = socket.socket(fileno=int(descriptor))
        except OSError:  # no socket, or closed since it was listed
            continue
        try:
            if found.type is socket.SOCK_STREAM and found.family in (socket.AF_INET, socket.AF_INET6):
                act(found)
        except OSError:
            continue
        finally:
            found.detach()

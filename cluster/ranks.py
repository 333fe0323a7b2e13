"""The engine processes of one worker, where its model is spread over several: one per rank, on one host or on several.

Rank 0 leads. It has two connections to each of the others, made by the control process: one for what is to be computed,
one for its transfers. When rank 0 dies its followers find them closed, and end; when a follower dies, the control
process ends the rest (`cluster.engine_host`).
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Union

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 16

QUIET_SECONDS, PROBE_SECONDS, PROBES = 5, 3, 3
"""A silent connection to another host is probed after so long, and is over after so many probes without an answer."""


class RankGone(Exception):
    """The rank at the other end has closed: this process's work has ended, too."""


class Frames:
    """One end of a connection between two ranks: frames of bytes, in order. One thread sends, one receives; both
    wait."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(True)
        self._socket = end
        self._received = bytearray()

    def hang_up(self) -> None:
        """Whoever sends or receives, at either end, finds the end of the stream. From any thread."""
        with contextlib.suppress(OSError):  # the other end has done so already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def send(self, frame: bytes) -> None:
        """Raises `RankGone`."""
        try:
            self._socket.sendall(_LENGTH.pack(len(frame)) + frame)
        except OSError as error:  # a connection between hosts may time out, too
            raise RankGone("the other rank has gone") from error

    def receive(self) -> bytes:
        """Raises `RankGone` at the end of the stream."""
        (size,) = _LENGTH.unpack(self._take(_LENGTH.size))
        return self._take(size)

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            try:
                data = self._socket.recv(max(_READ_BYTES, size - len(self._received)))
            except OSError as error:  # a connection between hosts may time out, too
                raise RankGone("the other rank has gone") from error
            if not data:
                raise RankGone("the other rank has gone")
            self._received += data
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken


def watch_connection(connection: socket.socket) -> None:
    """Of a TCP connection between two hosts: what is written goes at once, and a host that has vanished ends it, within
    about a quarter of a minute."""
    patience = QUIET_SECONDS + PROBE_SECONDS * PROBES
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, QUIET_SECONDS),
        (socket.TCP_KEEPINTVL, PROBE_SECONDS),
        (socket.TCP_KEEPCNT, PROBES),
        (socket.TCP_USER_TIMEOUT, patience * 1000),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


class MeetingFile(NamedTuple):
    """Where the torch.distributed of ranks on one host meets: a file that was empty."""

    path: str


class MeetingPort(NamedTuple):
    """The same for ranks on several hosts: a port of rank 0."""

    host: str
    """Where the others reach it."""
    port: int
    own_host: str
    """Where the others reach this rank."""
    listener: int | None
    """Rank 0's: the descriptor of the port's socket, which listens already."""


Meeting = Union[MeetingFile, MeetingPort]
NOWHERE = MeetingFile("")
"""For one that is alone."""


@dataclass(frozen=True)
class Rank:
    """Which rank this process is, and what connects it: rank 0 to each of the others in order, these to rank 0."""

    number: int = 0
    size: int = 1
    rendezvous: Meeting = NOWHERE
    steps: tuple[Frames, ...] = ()
    transfers: tuple[Frames, ...] = ()
    hosts: int = 1
    """That the ranks are spread over: as many on each, and those of a host follow each other."""

    @classmethod
    def inherited(
        cls, number: int, size: int, hosts: int, rendezvous: Meeting | None, descriptors: Sequence[int]
    ) -> Rank:
        """`descriptors`: for each connection the sockets for steps and for transfers. No rendezvous: it is alone."""
        if rendezvous is None:
            return cls()
        ends = [Frames(socket.socket(fileno=descriptor)) for descriptor in descriptors]
        return cls(number, size, rendezvous, tuple(ends[::2]), tuple(ends[1::2]), hosts)

    def share_of(self, cores: Sequence[int]) -> list[int]:
        """This rank's of its host's cores; where they are too few, ranks have the same one."""
        return list(cores[self.place :: self.neighbours]) or [cores[self.place % len(cores)]]

    @property
    def leads(self) -> bool:
        return self.number == 0

    @property
    def neighbours(self) -> int:
        """Ranks on this host, this one counted."""
        return self.size // self.hosts

    @property
    def place(self) -> int:
        """Of this rank among those of its host, from 0."""
        return self.number % self.neighbours


ALONE = Rank()

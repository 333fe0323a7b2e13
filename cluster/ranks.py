"""The engine processes of one worker, where its model is spread over several: one per rank, on one host.

Rank 0 leads. It has two sockets to each of the others, made by the control process: one for what is to be computed, one
for its transfers. When rank 0 dies its followers find them closed, and end; when a follower dies, the control process
ends the rest (`cluster.engine_host`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

_LENGTH = struct.Struct("<I")
_READ_BYTES = 1 << 16


class RankGone(Exception):
    """The rank at the other end has closed: this process's work has ended, too."""


class Frames:
    """One end of a socket between two ranks: frames of bytes, in order. One thread sends, one receives; both wait."""

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
        except ConnectionError as error:
            raise RankGone("the other rank has gone") from error

    def receive(self) -> bytes:
        """Raises `RankGone` at the end of the stream."""
        (size,) = _LENGTH.unpack(self._take(_LENGTH.size))
        return self._take(size)

    def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            try:
                data = self._socket.recv(max(_READ_BYTES, size - len(self._received)))
            except ConnectionError as error:
                raise RankGone("the other rank has gone") from error
            if not data:
                raise RankGone("the other rank has gone")
            self._received += data
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken


@dataclass(frozen=True)
class Rank:
    """Which rank this process is, and what connects it: rank 0 to each of the others in order, these to rank 0."""

    number: int = 0
    size: int = 1
    rendezvous: str = ""
    """A file where the ranks' torch.distributed meets."""
    steps: tuple[Frames, ...] = ()
    transfers: tuple[Frames, ...] = ()

    @classmethod
    def inherited(cls, number: int, size: int, descriptors: Sequence[int]) -> Rank:
        """`descriptors`: the rendezvous' file; then for each connection the sockets for steps and for transfers. None
        if it is alone."""
        if not descriptors:
            return cls()
        meeting, *sockets = descriptors
        ends = [Frames(socket.socket(fileno=descriptor)) for descriptor in sockets]
        return cls(number, size, f"/proc/{os.getpid()}/fd/{meeting}", tuple(ends[::2]), tuple(ends[1::2]))

    def share_of(self, cores: Sequence[int]) -> list[int]:
        """This rank's of a worker's cores; where they are too few, ranks have the same one."""
        return list(cores[self.number :: self.size]) or [cores[self.number % len(cores)]]

    @property
    def leads(self) -> bool:
        return self.number == 0


ALONE = Rank()

"""What a transfer engine must do for us: one-sided writes of whole pages into a peer's registered pool.

Who calls what: the engine process makes one backend over its KV pool at start-up, and from then on only the transfer
thread (`kv_transfer.thread`) calls it. Both ends of a handoff have one; the receiver's part is passive apart from
`progress`. A backend never frees or allocates pool memory; the engine process frees it after `close`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from cluster.errors import TransferFailed


class PoolMemory(NamedTuple):
    """The KV pool as bytes: page i is [address + i * page_bytes, address + (i + 1) * page_bytes)."""

    address: int
    pages: int
    page_bytes: int
    device: str = "cpu"


class WriteState(Enum):
    PENDING = "pending"
    DONE = "done"
    """All bytes are in the peer's memory."""
    FAILED = "failed"
    """Terminal too: no byte of this write will land any more, some may have."""


class WriteHandle(Protocol):
    """One posted batch of page writes; belongs to the backend that made it."""


class PeerUnreachable(TransferFailed):
    """The peer's memory can't be reached: it is dead, or the network to it is."""


class TransferBackend(Protocol):
    """See the module's docstring for threads and ownership."""

    name: str
    descriptor: bytes
    """Opaque to everyone else: goes to peers in `PeerHello`, and into their `connect`."""

    def connect(self, peer: str, descriptor: bytes) -> None:
        """Makes `peer`'s pool writable under that name. Replaces an earlier peer of that name, whose writes must have
        ended. May block for as long as a TCP connect. Raises `PeerUnreachable`."""

    def disconnect(self, peer: str) -> None:
        """Forgets `peer`; unknown names are fine. Its writes must have ended."""

    def write(self, peer: str, sources: Sequence[int], targets: Sequence[int]) -> WriteHandle:
        """Posts the copy of our page sources[i] to the peer's page targets[i], for all i. Our pages must not change
        until the handle is terminal. Raises `PeerUnreachable`, or `ValueError` for a page number outside a pool."""

    def poll(self, handle: WriteHandle) -> WriteState:
        """Drives the write and tells its state. A terminal state is told as often as asked."""

    def progress(self) -> None:
        """Drives what peers write to us; called regularly while any grant is open. Never blocks."""

    def close(self) -> None:
        """Unregisters the pool and drops all connections. Terminal; a second call does nothing."""

"""What a transfer engine must do for us: one-sided writes of whole pages into a peer's registered pool.

Who calls what: the engine process makes one backend over its KV pool at start-up, and from then on only the transfer
thread (`kv_transfer.thread`) calls it. Both ends of a handoff have one; the receiver's part is passive apart from
`progress`. A backend never frees or allocates pool memory; the engine process frees it after `close`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import msgspec

from cluster.errors import PeerUnreachable, ProtocolError
from kv_transfer.shard_plan import PageSlice

__all__ = ["PeerUnreachable", "PoolDescriptor", "PoolMemory", "TransferBackend", "WriteHandle", "WriteState"]


class PoolMemory(NamedTuple):
    """The KV pool as bytes: page i is [address + i * page_bytes, address + (i + 1) * page_bytes).

    A worker's pool has one page more than its ledger: the last one is nobody's, and connections are tried on it.
    """

    address: int
    pages: int
    page_bytes: int
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""

    @property
    def total_bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def trial_page(self) -> int:
        return self.pages - 1

    def page_address(self, page: int) -> int:
        """Address of a page of ours. Raises `ValueError` for a number outside the pool."""
        if not 0 <= page < self.pages:
            raise ValueError(f"page {page} is not in the pool of {self.pages} pages")
        return self.address + page * self.page_bytes


class PoolDescriptor(msgspec.Struct, frozen=True):
    """What every backend tells a peer of its pool: `endpoint` is the engine's own, the rest is arithmetic."""

    backend: str
    endpoint: bytes
    address: int
    pages: int
    page_bytes: int
    device: str

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def read(cls, descriptor: bytes) -> PoolDescriptor:
        """Raises `ProtocolError` for bytes that are no descriptor."""
        try:
            return msgspec.msgpack.decode(descriptor, type=cls)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"the peer's transfer descriptor is unreadable: {error}") from error

    @classmethod
    def decode(
        cls, descriptor: bytes, *, backend: str, page_bytes: int, part: PageSlice | None = None
    ) -> PoolDescriptor:
        """Raises `ProtocolError` unless it is a pool of the same kind of backend, and of the same pages, or of pages
        that `part` fits into."""
        found = cls.read(descriptor)
        fits = found.page_bytes == page_bytes if part is None else part.theirs.end <= found.page_bytes
        if found.backend != backend or not fits:
            raise ProtocolError(
                f"the peer's pool is of {found.backend} with pages of {found.page_bytes} bytes; "
                f"ours is of {backend} with {page_bytes}" + (f", of which we write {part}" if part else "")
            )
        return found

    def page_addresses(self, pages: Sequence[int]) -> list[int]:
        """Addresses of these pages in the peer's process. Raises `ProtocolError` for a page that its pool does not
        have."""
        for page in pages:
            if not 0 <= page < self.pages:
                raise ProtocolError(f"page {page} is not in the peer's pool of {self.pages} pages")
        return [self.address + page * self.page_bytes for page in pages]


class WriteState(Enum):
    PENDING = "pending"
    DONE = "done"
    """All bytes are in the peer's memory."""
    FAILED = "failed"
    """Terminal too: we send no byte of this write any more; some may have landed. Bytes that the peer's own kernel
    holds already may still land while the peer drives its engine (see `kv_transfer.driver.Settle`)."""


class WriteHandle(Protocol):
    """One posted batch of page writes."""

    def poll(self) -> WriteState:
        """Drives the write and tells its state; never blocks. A terminal state is told as often as asked. Called on
        the same thread as the backend."""


class TransferBackend(Protocol):
    """See the module's docstring for threads and ownership."""

    name: str
    descriptor: bytes
    """Opaque to everyone else: goes to peers in `PeerHello`, and into their `connect`."""

    def connect(self, peer: str, descriptor: bytes, part: PageSlice | None = None) -> None:
        """Makes `peer`'s pool writable under that name, of each page all, or this part. Replaces an earlier peer of
        that name, whose writes must have ended. May block for as long as a TCP connect. Raises `PeerUnreachable`, or
        `ProtocolError` for a descriptor that does not fit ours."""

    def disconnect(self, peer: str) -> None:
        """Forgets `peer`; unknown names are fine. Its writes must have ended."""

    def write(self, peer: str, sources: Sequence[int], targets: Sequence[int]) -> WriteHandle:
        """Posts the copy of our page sources[i] to the peer's page targets[i], or of their parts, for all i. Our pages
        must not change until the handle is terminal. Raises `PeerUnreachable` for a peer that is not connected or known
        to be dead, `ProtocolError` for a target outside its pool, `ValueError` for a source outside ours."""

    def progress(self) -> None:
        """Drives what peers write to us; called regularly while any grant is open. Never blocks."""

    def restart(self) -> None:
        """Ends all that the engine writes and starts it afresh over the same pool; takes some seconds. All writes
        that were under way are FAILED when it returns, or were DONE just before, in full earnest: nothing of them will
        leave this process any more, nor this host's kernel. All peers are forgotten. For writers only: nobody may be
        writing to us, for our `descriptor` may change.

        Raises `TransferStuck` if nothing but the end of this process would stop them.
        """

    def close(self) -> None:
        """Unregisters the pool and drops all connections. Terminal; a second call does nothing."""

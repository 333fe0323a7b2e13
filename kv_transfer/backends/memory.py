"""The transfer engine of unit tests: pools of one process, copied by memmove, failing exactly when told to.

It passes the same conformance tests as the real ones. `MemoryFabric` is the network between its backends, and the
place where tests ask for trouble: writes held back, failed, corrupted, or landing after everybody has forgotten them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.errors import PeerUnreachable, TransferStuck
from kv_transfer.backends.base import PoolDescriptor, PoolMemory, WriteState
from kv_transfer.shard_plan import PageSlice, Runs


@dataclass
class MemoryWrite:
    """One batch on the fabric, between agents; `moves` are (source address, target address)."""

    origin: str
    peer: str
    moves: list[tuple[int, int]]
    size: int
    """Bytes of each move."""
    state: WriteState = WriteState.PENDING

    def poll(self) -> WriteState:
        return self.state


@dataclass
class MemoryFabric:
    """Connects the memory backends of one test, by name of their agents. Not thread-safe: one driver at a time, or
    hooks set before the threads start."""

    hold: bool = False
    """New writes stay PENDING until `release`."""
    fail_writes: set[int] = field(default_factory=set)
    """Numbers of writes (counted from 0, in order of posting) that fail instead of copying."""
    corrupt_writes: set[int] = field(default_factory=set)
    """Numbers of writes whose first byte arrives flipped."""
    unstoppable: bool = False
    """Held writes can't be ended: `MemoryBackend.restart` raises."""
    posted: int = 0
    held: list[MemoryWrite] = field(default_factory=list)
    lost: list[MemoryWrite] = field(default_factory=list)
    """Writes that were told FAILED but whose bytes are still on their way; see `land_late`."""
    alive: dict[str, MemoryBackend] = field(default_factory=dict)

    def release(self) -> None:
        """Lets every held write happen."""
        held, self.held = self.held, []
        for write in held:
            self.carry(write, corrupt=False)

    def fail_held(self) -> None:
        """Ends every held write as FAILED, its bytes still on their way."""
        for write in self.held:
            write.state = WriteState.FAILED
        self.lost += self.held
        self.held = []

    def land_late(self) -> None:
        """The bytes of writes that were told FAILED reach the memory after all."""
        lost, self.lost = self.lost, []
        for write in lost:
            self.carry(write, corrupt=False)
            write.state = WriteState.FAILED

    def submit(self, write: MemoryWrite) -> None:
        number = self.posted
        self.posted += 1
        if number in self.fail_writes:
            write.state = WriteState.FAILED
        elif self.hold:
            self.held.append(write)
        else:
            self.carry(write, corrupt=number in self.corrupt_writes)

    def carry(self, write: MemoryWrite, *, corrupt: bool) -> None:
        """Copies now; fails if the peer has left the fabric."""
        if write.peer not in self.alive:
            write.state = WriteState.FAILED
            return
        for source, target in write.moves:
            ctypes.memmove(target, source, write.size)
        if corrupt and write.moves:
            first = ctypes.c_uint8.from_address(write.moves[0][1])
            first.value ^= 0xFF
        write.state = WriteState.DONE


class MemoryBackend:
    """A `TransferBackend` over `fabric`; `agent` is its address there."""

    name = "memory"

    def __init__(self, fabric: MemoryFabric, agent: str, pool: PoolMemory) -> None:
        self.fabric = fabric
        self.pool = pool
        self.progressed = 0
        self.restarts = 0
        self._agent = agent
        self._peers: dict[str, tuple[PoolDescriptor, PageSlice]] = {}
        fabric.alive[agent] = self
        self.descriptor = PoolDescriptor(
            self.name, agent.encode(), pool.address, pool.pages, pool.page_bytes, pool.device
        ).encode()

    def connect(self, peer: str, descriptor: bytes, part: PageSlice | None = None) -> None:
        found = PoolDescriptor.decode(descriptor, backend=self.name, page_bytes=self.pool.page_bytes, part=part)
        if found.endpoint.decode() not in self.fabric.alive:
            raise PeerUnreachable(f"{peer} has left the fabric")
        whole = Runs(0, self.pool.page_bytes)
        self._peers[peer] = found, part or PageSlice(whole, whole)

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)

    def write(self, peer: str, sources: Sequence[int], targets: Sequence[int]) -> MemoryWrite:
        if peer not in self._peers:
            raise PeerUnreachable(f"{peer} is not connected")
        remote, (ours, theirs) = self._peers[peer]
        begins = ours.addresses(self.pool.page_address(page) for page in sources)
        moves = list(zip(begins, theirs.addresses(remote.page_addresses(targets)), strict=True))
        write = MemoryWrite(self._agent, remote.endpoint.decode(), moves, ours.size)
        self.fabric.submit(write)
        return write

    def progress(self) -> None:
        self.progressed += 1

    def restart(self) -> None:
        """Held writes of ours are dropped: they never land."""
        if self.fabric.unstoppable:
            raise TransferStuck("told to be unable to")
        self.restarts += 1
        self._peers.clear()
        for write in self.fabric.held:
            if write.origin == self._agent:
                write.state = WriteState.FAILED
        self.fabric.held = [write for write in self.fabric.held if write.origin != self._agent]

    def close(self) -> None:
        self.fabric.alive.pop(self._agent, None)
        self._peers.clear()

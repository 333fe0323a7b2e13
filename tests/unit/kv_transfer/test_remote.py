"""A follower's transfers, over a socket: commands there, results back, and the end of either side."""

from __future__ import annotations

import socket
import threading
from queue import SimpleQueue

import pytest

from cluster.clock import MonotonicClock
from cluster.errors import PeerUnreachable
from cluster.ranks import Frames
from kv_transfer.backends.memory import MemoryBackend, MemoryFabric
from kv_transfer.digests import PageDigests
from kv_transfer.driver import ComputeDigests, Connect, PostWrites, WritesEnded
from kv_transfer.plan import Batch
from kv_transfer.remote import FollowerTransfers, RemoteTransfers
from kv_transfer.shard_plan import PageSlice, Runs
from kv_transfer.thread import TransferThread
from tests.unit.kv_transfer.world import Pool, fence

WAIT = 10.0


class Follower:
    def __init__(self) -> None:
        self.fabric = MemoryFabric()
        self.pool, self.theirs = Pool(4), Pool(4)
        backend = MemoryBackend(self.fabric, "follower", self.pool.memory)
        self.peer = MemoryBackend(self.fabric, "peer", self.theirs.memory)
        self.stopped = threading.Event()
        self.results: SimpleQueue = SimpleQueue()
        self.leader, end = (Frames(each) for each in socket.socketpair())
        self.end = end
        self.transfers = FollowerTransfers(
            end,
            lambda wake: TransferThread(backend, PageDigests(self.pool.memory), MonotonicClock(), wake),
            self.stopped.set,
        )
        self.remote = RemoteTransfers(self.leader, lambda results: [self.results.put(result) for result in results])

    def close(self) -> None:
        """Its threads find the end of the stream."""
        self.leader.hang_up()
        self.leader.close()
        self.end.close()


@pytest.fixture
def follower():
    made = Follower()
    yield made
    made.close()


def test_a_follower_writes_its_part_and_tells_its_digests(follower):
    follower.pool.fill(1, 0x11)
    part = PageSlice(Runs(2, 1, 3, 2), Runs(4, 1, 3, 3))
    follower.remote.post(Connect("peer", follower.peer.descriptor, part))
    follower.remote.post(PostWrites(fence(), "peer", Batch(0, (1,), (3,))))
    ended = follower.results.get(timeout=WAIT)
    assert isinstance(ended, WritesEnded) and ended.error is None and ended.batch == Batch(0, (1,), (3,))
    size = follower.theirs.memory.page_bytes
    assert follower.theirs.read(3) == bytes(4) + b"\x11\0\0" * 3 + bytes(size - 13)
    follower.remote.post(ComputeDigests(fence(), (1,), (part.ours,), rank=2))
    computed = follower.results.get(timeout=WAIT)
    assert (computed.rank, computed.digests) == (2, ended.digests)
    follower.transfers.close()


def test_an_error_comes_back_as_it_was(follower):
    follower.remote.post(PostWrites(fence(), "stranger", Batch(0, (1,), (3,))))
    ended = follower.results.get(timeout=WAIT)
    assert isinstance(ended.error, PeerUnreachable) and "stranger is not connected" in str(ended.error)
    follower.transfers.close()


def test_the_end_of_its_transfer_thread_is_the_followers(follower):
    follower.remote.post(Connect("peer", follower.peer.descriptor))
    follower.remote.post(PostWrites(fence(), "peer", Batch(0, (99,), (3,))))
    assert follower.stopped.wait(WAIT)
    with pytest.raises(ValueError, match="page 99 is not in the pool"):
        follower.transfers.close()

"""The transfer thread: results arrive and wake, errors surface, nothing waits."""

import threading
from queue import SimpleQueue

import pytest

from cluster.clock import MonotonicClock
from kv_transfer.backends.memory import MemoryBackend, MemoryFabric
from kv_transfer.digests import PageDigests
from kv_transfer.driver import Connect, ExpectWrites, PostWrites, Settle, Settled
from kv_transfer.plan import Batch
from kv_transfer.thread import TransferThread
from tests.unit.kv_transfer.world import Pool, fence

BOUND = 10.0


class Setup:
    def __init__(self) -> None:
        self.fabric = MemoryFabric()
        self.ours, self.theirs = Pool(4), Pool(4)
        self.backend = MemoryBackend(self.fabric, "ours", self.ours.memory)
        self.peer = MemoryBackend(self.fabric, "theirs", self.theirs.memory)
        self.woken = threading.Event()
        self.thread = TransferThread(self.backend, PageDigests(self.ours.memory), MonotonicClock(), wake=self.woken.set)
        self.thread.post(Connect("peer", self.peer.descriptor))

    def results(self):
        assert self.woken.wait(BOUND)
        self.woken.clear()
        return self.thread.results()


@pytest.fixture
def setup():
    setup = Setup()
    yield setup
    setup.thread.close()


def test_a_write_is_carried_out_and_wakes_the_step_loop(setup):
    setup.ours.fill(1, 9)
    setup.thread.post(PostWrites(fence(), "peer", Batch(0, (1,), (3,))))
    (ended,) = setup.results()
    assert ended.error is None
    assert setup.theirs.read(3) == setup.ours.read(1)
    assert setup.thread.results() == []


def test_held_writes_end_when_they_end(setup):
    setup.fabric.hold = True
    setup.thread.post(PostWrites(fence(), "peer", Batch(0, (1,), (3,))))
    setup.thread.post(ExpectWrites(fence()))
    setup.thread.post(Settle(fence()))
    assert setup.results() == [Settled(fence())]
    setup.fabric.release()
    (ended,) = setup.results()
    assert ended.error is None


def test_who_waits_is_told_of_a_result_and_of_nothing_else(setup):
    assert not setup.thread.wait(0.0)
    setup.thread.post(PostWrites(fence(), "peer", Batch(0, (1,), (3,))))
    assert setup.thread.wait(BOUND)
    assert len(setup.thread.results()) == 1
    assert not setup.thread.wait(0.0)


def test_an_error_that_nobody_foresaw_wakes_and_surfaces_every_time(setup):
    setup.thread.post(PostWrites(fence(), "peer", Batch(0, (99,), (3,))))
    for _ in range(2):
        with pytest.raises(ValueError, match="99"):
            setup.results()
        setup.woken.set()


def test_close_carries_out_what_was_posted_and_leaves_the_fabric(setup):
    setup.thread.post(PostWrites(fence(), "peer", Batch(0, (1,), (3,))))
    setup.thread.close()
    setup.thread.close()
    assert "ours" not in setup.fabric.alive
    assert len(setup.thread.results()) == 1


def test_an_idle_thread_tells_that_it_lives():
    seen: SimpleQueue[float | None] = SimpleQueue()
    pool = Pool(4)
    backend = MemoryBackend(MemoryFabric(), "ours", pool.memory)
    thread = TransferThread(backend, None, MonotonicClock(), wake=lambda: None, on_look=seen.put)
    assert [seen.get(timeout=BOUND) for _ in range(2)] == [None, None]
    thread.close()

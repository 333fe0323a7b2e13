"""The transfer thread's work, one turn at a time."""

import pytest

from cluster.clock import ManualClock
from cluster.errors import ConfigError, PeerUnreachable, ProtocolError, TransferFailed, TransferStuck
from kv_transfer.backends.base import PoolDescriptor, PoolMemory
from kv_transfer.backends.memory import MemoryBackend, MemoryFabric
from kv_transfer.digests import PageDigests
from kv_transfer.driver import (
    SETTLE_SECONDS,
    WRITE_TIMEOUT_SECONDS,
    ComputeDigests,
    Connect,
    DigestsComputed,
    Disconnect,
    ExpectWrites,
    PostWrites,
    Settle,
    Settled,
    TransferDriver,
)
from kv_transfer.plan import Batch
from tests.unit.kv_transfer.world import LAYOUT, Pool, fence


class Setup:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.fabric = MemoryFabric()
        self.ours, self.theirs = Pool(4), Pool(4)
        self.backend = MemoryBackend(self.fabric, "ours", self.ours.memory)
        self.peer = MemoryBackend(self.fabric, "theirs", self.theirs.memory)
        self.driver = TransferDriver(self.backend, PageDigests(self.ours.memory), self.clock)
        self.driver.take(Connect("peer", self.peer.descriptor))

    def write(self, number: int = 0) -> PostWrites:
        return PostWrites(fence(f"r{number}"), "peer", Batch(0, (1,), (2,)))


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_a_write_ends_with_its_times_and_the_digests_of_what_was_sent(setup):
    setup.fabric.hold = True
    setup.ours.fill(1, 7)
    assert setup.driver.take(setup.write()) == []
    assert setup.driver.turn() == []
    assert setup.driver.busy
    setup.clock.advance(2.0)
    setup.fabric.release()
    (ended,) = setup.driver.turn()
    assert (ended.error, ended.started, ended.ended) == (None, 0.0, 2.0)
    assert list(ended.digests) == PageDigests(setup.theirs.memory).of([2])
    assert not setup.driver.busy


def test_digests_are_no_part_of_the_time_of_a_write_that_ends_in_the_call(setup):
    class Slow:
        on_host = True

        def of(self, pages, runs=None):
            setup.clock.advance(1.0)
            return [0 for _ in pages]

    driver = TransferDriver(setup.backend, Slow(), setup.clock)
    driver.take(Connect("peer", setup.peer.descriptor))
    assert driver.take(setup.write()) == []
    (ended,) = driver.turn()
    assert (ended.error, ended.started, ended.ended, setup.clock.now()) == (None, 0.0, 0.0, 1.0)


def test_pages_that_are_digested_elsewhere_are_not_sent_to_who_would_find_them_damaged(setup):
    class OfADevice:
        on_host = False

        def of(self, pages, runs=None):
            return [0 for _ in pages]

    driver = TransferDriver(setup.backend, OfADevice(), setup.clock)
    driver.take(Connect("peer", setup.peer.descriptor))
    (refused,) = driver.take(setup.write())
    assert isinstance(refused.error, ProtocolError)
    assert "memory of cpu, and have other digests than ours" in refused.error.message
    unverified = TransferDriver(setup.backend, None, setup.clock)
    unverified.take(Connect("peer", setup.peer.descriptor))
    assert unverified.take(setup.write()) == []


def test_an_unknown_peer_or_a_bad_page_is_a_result_and_not_an_exception(setup):
    (unknown,) = setup.driver.take(PostWrites(fence(), "stranger", Batch(0, (1,), (2,))))
    assert isinstance(unknown.error, PeerUnreachable)
    (bad,) = setup.driver.take(PostWrites(fence(), "peer", Batch(0, (1,), (99,))))
    assert isinstance(bad.error, ProtocolError)


def test_after_a_failed_write_the_peer_is_connected_again_once_the_others_have_ended(setup):
    setup.fabric.hold = True
    setup.driver.take(setup.write(0))
    setup.driver.take(setup.write(1))
    held = setup.fabric.held
    setup.fabric.held = held[:1]
    setup.fabric.fail_held()
    (failed,) = setup.driver.turn()
    assert isinstance(failed.error, PeerUnreachable)
    (refused,) = setup.driver.take(setup.write(2))
    assert isinstance(refused.error, PeerUnreachable), "the old connection is still being wound up"
    setup.fabric.held = held[1:]
    setup.fabric.release()
    setup.driver.turn()
    setup.fabric.hold = False
    assert setup.driver.take(setup.write(3)) == []
    (ended,) = setup.driver.turn()
    assert ended.error is None


def test_a_peer_that_was_away_at_first_is_reached_by_a_later_write(setup):
    setup.peer.close()
    setup.driver.take(Connect("late", setup.peer.descriptor))
    write = PostWrites(fence(), "late", Batch(0, (1,), (2,)))
    (failed,) = setup.driver.take(write)
    assert isinstance(failed.error, PeerUnreachable)
    setup.fabric.alive["theirs"] = setup.peer
    assert setup.driver.take(write) == []


def test_a_disconnect_waits_for_writes_under_way(setup):
    setup.fabric.hold = True
    setup.driver.take(setup.write())
    setup.driver.take(Disconnect("peer"))
    setup.fabric.release()
    (ended,) = setup.driver.turn()
    assert ended.error is None
    with pytest.raises(PeerUnreachable):
        setup.backend.write("peer", [1], [2])


def test_a_reconnection_of_the_same_instance_keeps_writes_under_way(setup):
    setup.fabric.hold = True
    setup.driver.take(setup.write())
    setup.driver.take(Disconnect("peer"))
    setup.driver.take(Connect("peer", setup.peer.descriptor))
    setup.fabric.release()
    setup.driver.turn()
    setup.fabric.hold = False
    assert setup.driver.take(setup.write()) == []
    assert setup.driver.turn()[0].error is None


def test_the_backend_is_driven_exactly_while_a_peer_may_write(setup):
    setup.driver.turn()
    assert setup.backend.progressed == 0
    setup.driver.take(ExpectWrites(fence()))
    setup.driver.turn()
    assert setup.backend.progressed == 1
    assert setup.driver.take(ComputeDigests(fence(), (1,))) == [
        DigestsComputed(fence(), tuple(PageDigests(setup.ours.memory).of([1])))
    ]
    assert not setup.driver.busy


def test_the_oldest_of_what_is_under_way_is_known(setup):
    setup.fabric.hold = True
    assert setup.driver.oldest is None
    setup.clock.advance(1.0)
    setup.driver.take(setup.write())
    setup.clock.advance(1.0)
    setup.driver.take(ExpectWrites(fence()))
    setup.driver.turn()
    assert setup.driver.oldest == 1.0
    setup.fabric.release()
    setup.driver.turn()
    assert setup.driver.oldest == 2.0
    setup.driver.take(ComputeDigests(fence(), ()))
    assert setup.driver.oldest is None


def test_settling_takes_both_time_and_turns(setup):
    setup.driver.take(ExpectWrites(fence()))
    setup.driver.take(Settle(fence()))
    for _ in range(100):
        assert setup.driver.turn() == []
    setup.clock.advance(SETTLE_SECONDS)
    assert setup.driver.turn() == [Settled(fence())]
    assert not setup.driver.busy

    setup.driver.take(Settle(fence("other")))
    setup.clock.advance(10 * SETTLE_SECONDS)
    assert setup.driver.turn() == []


def test_without_a_digester_pages_are_not_read(setup):
    driver = TransferDriver(setup.backend, None, setup.clock)
    assert driver.take(ComputeDigests(fence(), (1, 2))) == [DigestsComputed(fence(), ())]


def test_digests_tell_pages_apart_and_refuse_device_memory():
    pool = Pool(3)
    pool.fill(1, 1)
    first, second, third = PageDigests(pool.memory).of([0, 1, 2])
    assert first == third != second
    with pytest.raises(ValueError):
        PageDigests(pool.memory).of([3])
    with pytest.raises(ConfigError, match="verify_digests"):
        PageDigests(PoolMemory(0, 1, 16, "cuda"))


def test_a_descriptor_of_another_backend_or_page_size_is_refused():
    memory = Pool(2).memory
    descriptor = PoolDescriptor("nixl", b"", memory.address, 2, LAYOUT.page_bytes, "cpu").encode()
    with pytest.raises(ProtocolError, match="nixl"):
        PoolDescriptor.decode(descriptor, backend="mooncake", page_bytes=LAYOUT.page_bytes)
    with pytest.raises(ProtocolError, match="bytes"):
        PoolDescriptor.decode(descriptor, backend="nixl", page_bytes=LAYOUT.page_bytes + 1)


# --- trials ----------------------------------------------------------------------------------------------------------


def trying(setup: Setup) -> TransferDriver:
    return TransferDriver(setup.backend, None, setup.clock, trial_page=setup.ours.memory.trial_page)


def test_a_new_connection_is_tried_on_the_page_that_is_nobodys(setup):
    setup.ours.fill(3, 7)
    driver = trying(setup)
    assert driver.take(Connect("peer", setup.peer.descriptor)) == []
    assert driver.turn() == []
    assert set(setup.theirs.read(3)) == {7}
    assert all(set(setup.theirs.read(page)) == {0} for page in range(3))
    assert not driver.busy


def test_a_connection_is_tried_once_and_not_at_each_hello(setup):
    driver = trying(setup)
    for _ in range(3):
        driver.take(Connect("peer", setup.peer.descriptor))
        driver.turn()
    assert setup.fabric.posted == 1


def test_a_disconnect_waits_for_the_trial(setup):
    setup.fabric.hold = True
    driver = trying(setup)
    driver.take(Connect("peer", setup.peer.descriptor))
    driver.take(Disconnect("peer"))
    driver.turn()
    assert driver.busy
    setup.fabric.release()
    driver.turn()
    assert not driver.busy
    with pytest.raises(PeerUnreachable):
        setup.backend.write("peer", [1], [2])


def test_a_failed_trial_harms_no_later_write(setup):
    setup.fabric.fail_writes.add(0)
    driver = trying(setup)
    driver.take(Connect("peer", setup.peer.descriptor))
    driver.turn()
    driver.take(setup.write())
    (ended,) = driver.turn()
    assert ended.error is None


# --- writes that never end -------------------------------------------------------------------------------------------


def watch(setup: Setup, seconds: float) -> list:
    """The thread looks twice a second."""
    results = []
    for _ in range(int(2 * seconds)):
        setup.clock.advance(0.5)
        results += setup.driver.turn()
    return results


def test_a_write_that_never_ends_costs_the_engine_and_can_never_land(setup):
    setup.fabric.hold = True
    setup.ours.fill(1, 9)
    setup.driver.take(setup.write())
    assert watch(setup, WRITE_TIMEOUT_SECONDS - 1) == []
    (ended,) = watch(setup, 2)
    assert isinstance(ended.error, PeerUnreachable)
    assert setup.backend.restarts == 1
    setup.fabric.release()
    assert set(setup.theirs.read(2)) == {0}, "what is said to have ended has ended"
    setup.fabric.hold = False
    setup.driver.take(setup.write())
    assert setup.driver.turn()[0].error is None, "the next write connects anew"
    assert set(setup.theirs.read(2)) == {9}


def test_writes_to_others_fail_with_the_engine_by_the_writers_own_fault(setup):
    MemoryBackend(setup.fabric, "bystander", Pool(4).memory)
    setup.driver.take(Connect("bystander", setup.fabric.alive["bystander"].descriptor))
    setup.fabric.hold = True
    setup.driver.take(setup.write())
    watch(setup, WRITE_TIMEOUT_SECONDS - 2)
    setup.driver.take(PostWrites(fence("other"), "bystander", Batch(0, (1,), (2,))))
    stuck, other = watch(setup, 4)
    assert isinstance(stuck.error, PeerUnreachable)
    assert type(other.error) is TransferFailed, "not the bystander's"
    assert not setup.driver.busy


def test_a_peer_whose_writes_end_one_by_one_is_slow_and_not_stuck(setup):
    setup.fabric.hold = True
    for _ in range(5):
        setup.driver.take(setup.write())
    for _ in range(5):
        assert watch(setup, WRITE_TIMEOUT_SECONDS - 1) == []
        setup.fabric.carry(setup.fabric.held.pop(0), corrupt=False)
        assert setup.driver.turn()[0].error is None
    assert setup.backend.restarts == 0


def test_time_in_which_our_own_process_was_stopped_is_no_time_waited(setup):
    setup.fabric.hold = True
    setup.driver.take(setup.write())
    setup.clock.advance(100 * WRITE_TIMEOUT_SECONDS)
    assert setup.driver.turn() == []
    assert setup.backend.restarts == 0


def test_an_engine_that_cannot_be_ended_ends_its_thread(setup):
    setup.fabric.hold = setup.fabric.unstoppable = True
    setup.driver.take(setup.write())
    with pytest.raises(TransferStuck, match="peer has ended"):
        watch(setup, WRITE_TIMEOUT_SECONDS + 1)

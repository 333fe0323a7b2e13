"""Sender and receiver together, message by message: what a worker sees of a handoff, good or bad."""

import msgspec
import pytest

from cluster.errors import ErrorInfo, IllegalTransition
from cluster.messages import Abort, Aborted, Ack, DeathWitnessed, Done, EngineRank, Grant, Offer, ProcessIdentity, Role
from kv_transfer.receiver import HandoffFailed, KVArrived, LeaseEnded, OfferArrived
from kv_transfer.sender import HandoffEnded
from tests.unit.kv_transfer.world import DECODE_EPOCH, PREFILL_EPOCH, World, fence

CANCELLED = ErrorInfo("DeadlineExceeded", "the router has cancelled it")


def offered(world: World, tokens: int = 10) -> None:
    world.sender.offer(fence(), "decode", tokens)
    world.deliver()
    assert world.poll_receiver() == [OfferArrived(fence(), tokens)]


def granted(world: World, pages=(5, 3, 9), skip: int = 0) -> None:
    """Both know of the grant, nothing is computed yet."""
    world.connect()
    offered(world)
    world.receiver.grant(fence(), pages, skip)
    world.deliver()


def compute_all(world: World) -> None:
    for page in (1, 2, 3):
        world.source.fill(page, 0x10 + page)
    world.sender.computed(fence(), [1, 2, 3], 10)
    world.sender.finish(fence(), 42)


@pytest.fixture
def world() -> World:
    return World()


def test_who_lingers_says_done_before_the_next_step(world):
    granted(world)
    world.prefill_port.works_while_awaited = world.decode_port.works_while_awaited = True
    compute_all(world)
    assert not world.to_decode, "the last pages are under way"
    world.sender.linger(1.0)
    world.deliver()
    world.receiver.linger(1.0)
    assert world.receiver.poll(world.clock.now()) == [KVArrived(fence(), 42, 0.0)], "in time for the step that begins"


def test_nobody_lingers_for_what_does_not_come(world):
    granted(world)
    compute_all(world)
    world.sender.linger(1.0)
    assert not world.to_decode
    world.sender.cancel(fence(), CANCELLED)
    world.sender.linger(1.0)


def test_pages_arrive_chunk_by_chunk_and_both_sides_end(world):
    granted(world)
    world.source.fill(1, 0xA1)
    world.sender.computed(fence(), [1], 4)
    assert world.poll_sender() == []
    assert world.target.read(5) == world.source.read(1), "a full page goes out before the prompt is done"
    world.source.fill(2, 0xA2)
    world.source.fill(3, 0xA3)
    world.sender.computed(fence(), [1, 2, 3], 10)
    world.sender.finish(fence(), 42)
    world.poll_sender()
    world.deliver()
    assert world.poll_receiver() == [KVArrived(fence(), 42, 0.0)]
    assert [world.target.read(page) for page in (5, 3, 9)] == [world.source.read(page) for page in (1, 2, 3)]
    world.deliver()
    (ended,) = world.poll_sender()
    assert ended.error is None
    assert ended.timings.pages == 3
    assert world.sender.active == world.receiver.active == 0


def test_pages_computed_before_the_grant_wait_and_skipped_ones_stay(world):
    world.connect()
    offered(world)
    before = world.target.read(5)
    compute_all(world)
    world.receiver.grant(fence(), [9], skip_tokens=8)
    world.deliver()
    world.poll_sender()
    world.deliver()
    assert world.poll_receiver() == [KVArrived(fence(), 42, 0.0)]
    assert world.target.read(9) == world.source.read(3)
    assert world.target.read(5) == before


def test_a_damaged_page_is_never_accepted(world):
    world.fabric.corrupt_writes = {0}
    granted(world)
    compute_all(world)
    world.poll_sender()
    world.deliver()
    failed, ended = world.poll_receiver()
    assert isinstance(failed, HandoffFailed)
    assert (failed.error.code, failed.blame) == ("TransferFailed", Role.PREFILL)
    assert ended == LeaseEnded(fence())
    world.deliver()
    (ours,) = world.poll_sender()
    assert (ours.error.code, ours.blame) == ("TransferFailed", Role.PREFILL), "both legs name the same culprit"


def test_a_failed_write_ends_both_sides_and_gives_the_pages_back(world):
    world.fabric.fail_writes = {0}
    granted(world)
    compute_all(world)
    (ended,) = world.poll_sender()
    assert (ended.error.code, ended.blame) == ("TransferFailed", Role.DECODE)
    world.deliver()
    (failed,) = world.poll_receiver()
    assert failed.blame is Role.DECODE
    assert world.settle() == [LeaseEnded(fence())]


def test_the_next_handoff_after_a_failed_write_connects_again(world):
    world.fabric.fail_writes = {0}
    granted(world)
    compute_all(world)
    world.poll_sender()
    again = fence(attempt=1)
    world.sender.offer(again, "decode", 4)
    world.deliver()
    world.receiver.grant(again, [7])
    world.deliver()
    world.sender.computed(again, [1], 4)
    world.sender.finish(again, 1)
    world.poll_sender()
    world.deliver()
    assert KVArrived(again, 1, 0.0) in world.poll_receiver()


def test_cancelled_pages_stay_in_quarantine_while_a_write_is_under_way(world):
    world.fabric.hold = True
    granted(world)
    compute_all(world)
    assert world.poll_sender() == []
    world.receiver.cancel(fence(), CANCELLED)
    world.deliver()
    assert world.settle() == []
    assert world.receiver.quarantined == [fence()]
    assert world.poll_sender() == [], "the source pages are still being read"
    world.fabric.release()
    (ended,) = world.poll_sender()
    assert ended == HandoffEnded(fence(), CANCELLED, None, None)
    world.deliver()
    assert world.settle() == [LeaseEnded(fence())]
    assert world.receiver.quarantined == []


def test_a_cancel_of_the_sender_reaches_the_receiver_without_blame(world):
    granted(world)
    world.sender.cancel(fence(), CANCELLED)
    assert world.poll_sender() == [HandoffEnded(fence(), CANCELLED, None, None)]
    world.deliver()
    assert world.poll_receiver() == [HandoffFailed(fence(), CANCELLED, None)]
    assert world.settle() == [LeaseEnded(fence())]


def test_a_refused_offer_ends_the_sender_and_blames_decode(world):
    world.connect()
    offered(world)
    world.receiver.refuse(fence(), ErrorInfo("Draining", "leaving"))
    world.deliver()
    (ended,) = world.poll_sender()
    assert (ended.error.code, ended.blame) == ("Draining", Role.DECODE)
    assert world.poll_receiver() == []


def test_a_broken_connection_fails_both_at_once_but_pages_wait_for_the_writers_word(world):
    world.fabric.hold = True
    granted(world)
    compute_all(world)
    world.poll_sender()
    world.disconnect()
    (failed,) = world.poll_receiver()
    assert (failed.error.code, failed.blame) == ("WorkerLost", Role.PREFILL)
    assert world.settle() == []
    world.connect()
    assert [type(message) for message in world.deliver()] == [Abort]
    assert world.settle() == [], "the write that began before is still under way"
    world.fabric.release()
    (ended,) = world.poll_sender()
    assert (ended.error.code, ended.blame) == ("WorkerLost", Role.DECODE)
    assert Aborted in [type(message) for message in world.deliver()]
    assert world.settle() == [LeaseEnded(fence())]


def test_a_sender_that_has_forgotten_says_that_nothing_is_under_way(world):
    granted(world)
    world.disconnect()
    world.poll_sender()
    world.connect()
    assert [type(message) for message in world.deliver()] == [Abort, Aborted]
    world.poll_receiver()
    assert world.settle() == [LeaseEnded(fence())]


def test_a_new_epoch_of_the_writer_is_no_proof_but_its_death_is(world):
    granted(world)
    world.disconnect()
    world.prefill_epoch += 1
    world.start_prefill()
    world.connect()
    world.poll_receiver()
    assert world.settle() == []
    world.dead.add(PREFILL_EPOCH)
    assert world.settle() == []
    assert world.settle() == [LeaseEnded(fence())]


def fall_silent(world: World) -> None:
    """The writer of pages in quarantine is gone, and our kernel can't say whether it is dead. Its successor is here."""
    granted(world)
    world.disconnect()
    world.prefill_epoch += 1
    world.start_prefill()
    world.connect()
    world.poll_receiver()


def test_a_death_on_another_host_is_proven_by_a_witness_there(world):
    fall_silent(world)
    assert later(world) == [], "its successor's host knows nothing of its death"
    world.dead_elsewhere.add(PREFILL_EPOCH)
    assert later(world) == [LeaseEnded(fence())]


@pytest.mark.parametrize("engine", [ProcessIdentity("other boot", "pid", 5, 1), ProcessIdentity("boot", "other", 5, 1)])
def test_the_word_of_a_witness_who_cannot_know_is_refused(world, engine):
    fall_silent(world)
    world.receiver.peer_up(msgspec.structs.replace(world.hello(Role.PREFILL, 5), worker="stranger", engine=engine))
    written_by = world.hello(Role.PREFILL, PREFILL_EPOCH).engine
    world.receiver.receive("stranger", 5, DeathWitnessed(written_by))
    world.receiver.receive("nobody", 6, DeathWitnessed(written_by))
    assert world.settle() == []
    assert world.receiver.stale["DeathWitnessed"] == 2


def test_a_worker_with_a_rank_on_the_writers_host_is_a_witness(world):
    fall_silent(world)
    written_by = world.hello(Role.PREFILL, PREFILL_EPOCH).engine
    elsewhere = ProcessIdentity("other boot", "pid", 5, 1)
    neighbour = EngineRank(b"", msgspec.structs.replace(written_by, pid=77))
    hello = msgspec.structs.replace(
        world.hello(Role.PREFILL, 5), worker="spread", engine=elsewhere, followers=[neighbour]
    )
    world.receiver.peer_up(hello)
    world.receiver.receive("spread", 5, DeathWitnessed(written_by))
    assert world.settle() == [LeaseEnded(fence())]


def test_the_workers_own_proof_ends_all_leases_of_that_instance(world):
    granted(world)
    world.receiver.writer_fenced("prefill", PREFILL_EPOCH)
    (failed,) = world.poll_receiver()
    assert failed.blame is Role.PREFILL
    assert world.settle() == [LeaseEnded(fence())]


def test_late_bytes_of_a_failed_write_land_before_the_page_is_free(world):
    world.fabric.hold = True
    granted(world)
    compute_all(world)
    world.poll_sender()
    world.fabric.fail_held()
    world.poll_sender()
    world.deliver()
    driven = world.decode_port.driver._backend.progressed
    assert LeaseEnded(fence()) in world.settle()
    assert world.decode_port.driver._backend.progressed - driven >= 50, "our own engine delivers them while driven"


def test_an_offer_waits_for_the_connection_but_not_for_ever(world):
    world.sender.offer(fence(), "decode", 10)
    assert world.poll_sender() == []
    world.connect()
    assert [type(message) for message in world.deliver()] == [Offer]
    other = fence("other")
    world.disconnect()
    world.sender.offer(other, "decode", 10)
    world.clock.advance(5.0)
    ended = {event.fence: event for event in world.poll_sender()}
    assert ended[other].error.code == "WorkerLost"
    assert ended[other].blame is Role.DECODE


def test_a_restarted_decode_worker_fails_the_handoffs_to_its_former_life(world):
    granted(world)
    world.sender.peer_up(world.hello(Role.DECODE, DECODE_EPOCH + 1))
    (ended,) = world.poll_sender()
    assert (ended.error.code, ended.blame) == ("WorkerLost", Role.DECODE)
    world.sender.offer(fence("late"), "decode", 10)
    (late,) = world.poll_sender()
    assert (late.error.code, late.blame) == ("WorkerLost", Role.DECODE)


def test_a_lost_ack_is_repeated_after_the_reconnection(world):
    granted(world)
    compute_all(world)
    world.poll_sender()
    world.deliver()
    world.poll_receiver()
    assert isinstance(world.to_prefill[0], Ack)
    world.disconnect()
    assert world.poll_sender() == [], "the receiver may well be decoding: no reason to fail"
    world.connect()
    assert [type(message) for message in world.deliver()] == [Done, Ack]
    (ended,) = world.poll_sender()
    assert ended.error is None


def test_repeated_messages_change_nothing(world):
    world.connect()
    world.sender.offer(fence(), "decode", 10)
    world.to_decode.append(world.to_decode[0])
    world.deliver()
    assert world.poll_receiver() == [OfferArrived(fence(), 10)]
    world.receiver.grant(fence(), [5, 3, 9])
    world.to_prefill.append(world.to_prefill[0])
    compute_all(world)
    world.deliver()
    world.poll_sender()
    world.to_decode.append(world.to_decode[0])
    world.to_decode.append(Offer(fence(), 10))
    world.deliver()
    assert world.poll_receiver() == [KVArrived(fence(), 42, 0.0)]
    world.to_decode.append(Offer(fence(), 10))
    world.deliver()
    (ended,) = world.poll_sender()
    assert ended.error is None
    assert world.poll_receiver() == [], "an ended handoff is not offered twice"


@pytest.mark.parametrize(
    "foreign", [fence(prefill=PREFILL_EPOCH - 1), fence(decode=DECODE_EPOCH - 1), fence(decode=DECODE_EPOCH + 1)]
)
def test_messages_of_other_lives_are_refused_and_counted(world, foreign):
    world.connect()
    world.receiver.receive("prefill", PREFILL_EPOCH, Offer(foreign, 10))
    world.sender.receive("decode", DECODE_EPOCH, Grant(foreign, [1, 2, 3]))
    assert (world.receiver.stale["Offer"], world.sender.stale["Grant"]) == (1, 1)
    assert world.poll_receiver() == []
    assert not world.to_decode


def test_messages_of_an_instance_that_is_not_connected_are_refused(world):
    world.connect()
    world.receiver.receive("prefill", PREFILL_EPOCH - 1, Offer(fence(), 10))
    world.receiver.receive("stranger", PREFILL_EPOCH, Offer(fence(), 10))
    assert world.receiver.stale["Offer"] == 2


def test_done_without_a_grant_is_refused(world):
    world.connect()
    offered(world)
    world.receiver.receive("prefill", PREFILL_EPOCH, Done(fence(), 1, []))
    assert world.receiver.stale["Done"] == 1
    assert world.poll_receiver() == []


def test_pages_granted_too_late_come_back(world):
    world.connect()
    offered(world)
    world.disconnect()
    world.receiver.grant(fence(), [5, 3, 9])
    failed, ended = world.poll_receiver()
    assert isinstance(failed, HandoffFailed)
    assert ended == LeaseEnded(fence())
    with pytest.raises(IllegalTransition):
        world.receiver.grant(fence(), [5, 3, 9])


def test_after_a_cancel_only_the_return_of_the_pages_is_told(world):
    granted(world)
    compute_all(world)
    world.poll_sender()
    world.deliver()
    world.decode_port.run()
    world.receiver._finish(*world.decode_port.results())
    assert world.receiver.busy
    world.receiver.cancel(fence(), CANCELLED)
    assert world.poll_receiver() == [LeaseEnded(fence())], "KV that arrived for nobody gives its pages back"


def test_a_grant_of_pages_that_the_peer_does_not_have_fails_the_handoff(world):
    granted(world, pages=(5, 3, 99))
    compute_all(world)
    (ended,) = world.poll_sender()
    assert (ended.error.code, ended.blame) == ("TransferFailed", Role.DECODE)


def test_our_own_page_numbers_outside_the_pool_are_a_bug_that_surfaces(world):
    granted(world)
    world.sender.computed(fence(), [1, 2, 99], 10)
    with pytest.raises(ValueError):
        world.prefill_port.run()


# --- lost messages ---------------------------------------------------------------------------------------------------


def lose(world: World, kind: type) -> None:
    """The next message of that type is lost, without that its connection breaks."""
    while True:
        for wire, deliver in ((world.to_decode, world.deliver_to_decode), (world.to_prefill, world.deliver_to_prefill)):
            if wire and isinstance(wire[0], kind):
                wire.popleft()
                return
            if wire:
                deliver()


def later(world: World) -> list:
    """What ends in the next seconds, with all that is said meanwhile."""
    events = []
    for _ in range(30):
        world.clock.advance(0.5)
        events += world.poll_sender() + world.poll_receiver()
        world.decode_port.run(turns=60)
        world.deliver()
    return events


def test_a_lost_offer_is_repeated(world):
    world.connect()
    world.sender.offer(fence(), "decode", 10)
    lose(world, Offer)
    assert later(world) == [OfferArrived(fence(), 10)]


@pytest.mark.parametrize("lost", [Grant, Done, Ack])
def test_a_lost_message_of_a_good_handoff_delays_it_only(world, lost):
    world.connect()
    offered(world)
    world.receiver.grant(fence(), (5, 3, 9))
    compute_all(world)
    if lost is not Grant:
        world.deliver()
        world.poll_sender()
    if lost is Ack:
        world.deliver()
        world.poll_receiver()
    lose(world, lost)
    events = later(world)
    assert next(event for event in events if isinstance(event, HandoffEnded)).error is None
    assert [event.first_token for event in events if isinstance(event, KVArrived)] == ([] if lost is Ack else [42])
    assert world.sender.active == world.receiver.active == 0


@pytest.mark.parametrize("lost", [Abort, Aborted])
def test_a_lost_message_of_an_abort_delays_the_return_of_the_pages_only(world, lost):
    granted(world)
    world.receiver.cancel(fence(), CANCELLED)
    lose(world, lost)
    events = later(world)
    assert LeaseEnded(fence()) in events
    assert world.receiver.quarantined == []
    assert world.sender.active == 0


def test_aborted_lost_before_anybody_asked_for_it_is_found_out_by_the_repeated_grant(world):
    """The sender has ended by itself and forgotten: nobody repeats its ABORTED unasked."""
    granted(world)
    world.sender.cancel(fence(), CANCELLED)
    lose(world, Aborted)
    world.poll_sender()
    failed, ended = later(world)
    assert isinstance(failed, HandoffFailed)
    assert ended == LeaseEnded(fence())


def test_a_write_that_never_ends_fails_the_handoff_and_gives_the_pages_back(world):
    """The engine is ended: after that, ABORTED is true."""
    world.fabric.hold = True
    granted(world)
    compute_all(world)
    events = []
    for _ in range(60):
        world.clock.advance(0.5)
        world.prefill_port.run()
        events += world.poll_sender()
        world.deliver()
        world.decode_port.run(turns=60)
        events += world.poll_receiver()
    ended = next(event for event in events if isinstance(event, HandoffEnded))
    assert (ended.error.code, ended.blame) == ("TransferFailed", Role.DECODE)
    assert events[-1] == LeaseEnded(fence())
    before = [world.target.read(page) for page in (5, 3, 9)]
    world.fabric.release()
    assert [world.target.read(page) for page in (5, 3, 9)] == before

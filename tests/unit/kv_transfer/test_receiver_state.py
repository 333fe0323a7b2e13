"""The receiver's machine: every state and event, and the paths that matter."""

import pytest

from cluster.errors import ErrorInfo, IllegalTransition
from cluster.messages import Abort, Ack, Grant, Role
from kv_transfer.receiver_state import (
    AbortedArrived,
    Accept,
    DeadlinePassed,
    DoneArrived,
    DrainWrites,
    EndLease,
    Expect,
    Fail,
    GivenUp,
    GrantPages,
    OfferedAgain,
    PagesSettled,
    PeerDown,
    PeerUp,
    ReceiverLease,
    ReceiverState,
    RepeatDue,
    Send,
    Verified,
    Verify,
    WriterFenced,
)
from tests.unit.kv_transfer.world import fence

ERROR = ErrorInfo("TransferFailed", "because")
EXPIRY = 600.0
EVENTS = {
    event_type: event_type(*arguments)
    for event_type, arguments in {
        OfferedAgain: (),
        GrantPages: ((7, 8), 0),
        GivenUp: (ERROR, None),
        DoneArrived: (42, (1, 2)),
        Verified: ((1, 2),),
        AbortedArrived: (ERROR, Role.PREFILL),
        PeerUp: (),
        PeerDown: (),
        WriterFenced: (),
        DeadlinePassed: (),
        RepeatDue: (),
        PagesSettled: (),
    }.items()
}
TO_STATE = {
    ReceiverState.OFFERED: [],
    ReceiverState.GRANTED: [GrantPages],
    ReceiverState.VERIFYING: [GrantPages, DoneArrived],
    ReceiverState.QUARANTINED: [GrantPages, PeerDown],
    ReceiverState.SETTLING: [GrantPages, PeerDown, WriterFenced],
    ReceiverState.ENDED: [GrantPages, DoneArrived, Verified],
}
NEEDS_THE_WRITERS_WORD = {ReceiverState.GRANTED, ReceiverState.QUARANTINED}


def in_state(state: ReceiverState, digests: bool = True) -> ReceiverLease:
    lease = ReceiverLease(fence(), tokens=6, page_size=4, digests=digests, expires_at=EXPIRY)
    for event_type in TO_STATE[state]:
        lease.handle(EVENTS[event_type], 1.0)
    assert lease.state is state
    return lease


@pytest.mark.parametrize("state", list(ReceiverState))
@pytest.mark.parametrize("event_type", list(EVENTS))
def test_every_state_and_event_is_in_the_table_or_raises(state, event_type):
    lease = in_state(state)
    if (state, event_type) not in ReceiverLease.TABLE:
        with pytest.raises(IllegalTransition, match="story"):
            lease.handle(EVENTS[event_type], 2.0)
        return
    actions = lease.handle(EVENTS[event_type], 2.0)
    pages_back = any(isinstance(action, (Accept, EndLease)) for action in actions)
    assert not (pages_back and state in NEEDS_THE_WRITERS_WORD), "a page came back that its writer may still write"
    if lease.state is ReceiverState.ENDED:
        assert lease.answer is not None


def test_the_table_has_no_handler_that_does_not_exist():
    assert all(hasattr(ReceiverLease, handler) for handler in ReceiverLease.TABLE.values())


def test_pages_are_verified_before_they_are_accepted():
    lease = in_state(ReceiverState.OFFERED)
    grant = Grant(fence(), [7, 8])
    assert lease.handle(GrantPages((7, 8), 0), 1.0) == [Expect(), Send(grant)]
    assert lease.handle(OfferedAgain(), 1.0) == [Send(grant)]
    assert lease.handle(DoneArrived(42, (1, 2)), 1.0) == [Verify((7, 8))]
    assert lease.handle(Verified((1, 2)), 1.0) == [Send(Ack(fence())), Accept(42, 0.0)]


@pytest.mark.parametrize("digests", [(1, 3), (1,), (), (1, 2, 3)])
def test_damaged_pages_fail_and_come_back_at_once(digests):
    lease = in_state(ReceiverState.GRANTED)
    lease.handle(DoneArrived(42, digests), 1.0)
    abort, fail, end = lease.handle(Verified((1, 2)), 1.0)
    assert isinstance(abort.message, Abort)
    assert (fail.error.code, fail.blame) == ("TransferFailed", Role.PREFILL)
    assert end == EndLease()


def test_without_digests_done_is_enough():
    lease = in_state(ReceiverState.GRANTED, digests=False)
    lease.handle(DoneArrived(42, ()), 1.0)
    assert Accept(42, 0.0) in lease.handle(Verified(()), 1.0)


@pytest.mark.parametrize("proof", [AbortedArrived, DoneArrived, WriterFenced])
def test_quarantined_pages_come_back_by_the_writers_word_or_its_death(proof):
    lease = in_state(ReceiverState.QUARANTINED)
    for idle in (PeerDown, GivenUp):
        assert lease.handle(EVENTS[idle], 1.0) == []
    (asked,) = lease.handle(PeerUp(), 1.0)
    assert isinstance(asked.message, Abort), "a reconnected writer is asked again"
    assert lease.handle(EVENTS[proof], 1.0) == [DrainWrites()]
    assert lease.handle(PagesSettled(), 1.0) == [EndLease()]


@pytest.mark.parametrize(("state", "said"), [(ReceiverState.GRANTED, Grant), (ReceiverState.QUARANTINED, Abort)])
def test_a_writer_is_asked_until_it_answers(state, said):
    lease = in_state(state)
    for asked in range(1, 20):
        later = 100.0 * asked
        if later >= EXPIRY and state is ReceiverState.GRANTED:
            break
        assert lease.timer(later) == RepeatDue()
        (again,) = lease.handle(RepeatDue(), later)
        assert isinstance(again.message, said)
        assert lease.timer(later + 1.0) is None
    assert lease.state is state


def test_an_offer_that_our_worker_never_answers_expires_by_our_own_fault():
    lease = in_state(ReceiverState.OFFERED)
    assert (lease.timer(EXPIRY - 1), lease.timer(EXPIRY)) == (None, DeadlinePassed())
    abort, fail = lease.handle(DeadlinePassed(), EXPIRY)
    assert isinstance(abort.message, Abort)
    assert fail.blame is Role.DECODE
    assert lease.state is ReceiverState.ENDED


def test_a_grant_that_is_never_written_expires_but_its_pages_stay_the_writers():
    lease = in_state(ReceiverState.GRANTED)
    assert lease.timer(EXPIRY) == DeadlinePassed()
    abort, fail = lease.handle(DeadlinePassed(), EXPIRY)
    assert isinstance(abort.message, Abort)
    assert (fail.error.code, fail.blame) == ("TransferFailed", Role.PREFILL)
    assert lease.state is ReceiverState.QUARANTINED


def test_a_broken_connection_is_told_at_once_and_blames_prefill():
    (fail,) = in_state(ReceiverState.GRANTED).handle(PeerDown(), 1.0)
    assert isinstance(fail, Fail)
    assert (fail.error.code, fail.blame) == ("WorkerLost", Role.PREFILL)


def test_a_broken_connection_after_done_does_no_harm():
    lease = in_state(ReceiverState.VERIFYING)
    lease.handle(PeerDown(), 1.0)
    lease.handle(WriterFenced(), 1.0)
    assert Accept(42, 0.0) in lease.handle(Verified((1, 2)), 1.0)


@pytest.mark.parametrize(("pages", "skip"), [((7,), 0), ((7, 8, 9), 0), ((7,), 3), ((7, 8), 4), ((), 12)])
def test_a_grant_of_the_wrong_size_is_our_own_bug(pages, skip):
    with pytest.raises(ValueError):
        in_state(ReceiverState.OFFERED).handle(GrantPages(pages, skip), 1.0)

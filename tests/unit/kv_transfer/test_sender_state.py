"""The sender's machine: every state and event, and the paths that matter."""

from itertools import pairwise

import pytest

from cluster.errors import ErrorInfo, IllegalTransition, PeerUnreachable, TransferFailed
from cluster.messages import Aborted, Done, Grant, Offer, Role
from kv_transfer.plan import WritePlan
from kv_transfer.sender_state import (
    AbortAsked,
    Acked,
    BatchEnded,
    Cancelled,
    Computed,
    DeadlinePassed,
    Finished,
    Granted,
    PeerDown,
    PeerReplaced,
    PeerUp,
    Post,
    Release,
    RepeatDue,
    Send,
    SenderHandoff,
    SenderState,
)
from tests.unit.kv_transfer.world import fence

ERROR = ErrorInfo("TransferFailed", "because")
EXPIRY = 600.0
EVENTS = {
    event_type: event_type(*arguments)
    for event_type, arguments in {
        PeerUp: (),
        PeerDown: (),
        PeerReplaced: (),
        DeadlinePassed: (),
        RepeatDue: (),
        Granted: (Grant(fence(), [7, 8]),),
        Computed: ([1, 2], 6),
        Finished: (42,),
        BatchEnded: (None, None, (), 1.0, 2.0),
        Acked: (),
        AbortAsked: (ERROR, Role.DECODE),
        Cancelled: (ERROR,),
    }.items()
}


def machine() -> SenderHandoff:
    return SenderHandoff(
        fence(), WritePlan(6, 4), page_bytes=32, connect_timeout=5.0, now=0.0, digests=True, expires_at=EXPIRY
    )


def post(actions):
    return next(action for action in actions if isinstance(action, Post))


def ended(batch, error=None, at=2.0):
    digests = tuple(1000 + source for source in batch.sources)
    return BatchEnded(batch, error, digests, at - 1.0, at)


def in_state(state: SenderState) -> tuple[SenderHandoff, Post | None]:
    """A machine in that state, and its write under way, if any."""
    handoff = machine()
    handoff.handle(Computed([1, 2], 6), 0.0)
    if state is SenderState.UNCONNECTED:
        return handoff, None
    handoff.handle(PeerUp(), 1.0)
    if state is SenderState.OFFERED:
        return handoff, None
    handoff.handle(Finished(42), 1.0)
    write = post(handoff.handle(Granted(Grant(fence(), [7, 8])), 1.0))
    if state is SenderState.STOPPING:
        handoff.handle(Cancelled(ERROR), 1.0)
    elif state in (SenderState.HOLDING, SenderState.ENDED):
        handoff.handle(ended(write.batch), 2.0)
        if state is SenderState.ENDED:
            handoff.handle(Acked(), 3.0)
    assert handoff.state is state
    return handoff, write


@pytest.mark.parametrize("state", list(SenderState))
@pytest.mark.parametrize("event_type", list(EVENTS))
def test_every_state_and_event_is_in_the_table_or_raises(state, event_type):
    handoff, write = in_state(state)
    event = ended(write.batch) if event_type is BatchEnded and write else EVENTS[event_type]
    if (state, event_type) in SenderHandoff.TABLE:
        actions = handoff.handle(event, 4.0)
        assert sum(isinstance(action, Release) for action in actions) <= 1
        assert (handoff.state is SenderState.ENDED) == (
            state is SenderState.ENDED or any(isinstance(action, Release) for action in actions)
        )
    else:
        with pytest.raises(IllegalTransition, match="story"):
            handoff.handle(event, 4.0)


def test_the_table_has_no_handler_that_does_not_exist():
    assert all(hasattr(SenderHandoff, handler) for handler in SenderHandoff.TABLE.values())


def test_chunks_go_out_while_the_next_is_computed_and_digests_follow_the_grants_order():
    handoff = machine()
    assert handoff.handle(PeerUp(), 1.0) == [Send(Offer(fence(), 6))]
    assert handoff.handle(Granted(Grant(fence(), [7, 8])), 3.0) == []
    first = post(handoff.handle(Computed([1], 4), 4.0))
    assert (first.batch.sources, first.batch.targets) == ((1,), (7,))
    last = post(handoff.handle(Computed([1, 2], 6), 5.0))
    assert handoff.handle(Finished(42), 5.0) == []
    assert handoff.handle(ended(last.batch, at=6.0), 6.0) == []
    assert handoff.handle(ended(first.batch, at=5.5), 6.0) == [Send(Done(fence(), 42, [1001, 1002]))]
    (release,) = handoff.handle(Acked(), 7.0)
    assert release.error is None
    assert release.timings.grant_wait_seconds == 2.0
    assert release.timings.exposed_seconds == 2.0
    assert (release.timings.pages, release.timings.bytes) == (2, 64)


def test_source_pages_are_kept_until_the_last_write_under_way_has_ended():
    handoff = machine()
    handoff.handle(PeerUp(), 1.0)
    handoff.handle(Granted(Grant(fence(), [7, 8])), 1.0)
    first = post(handoff.handle(Computed([1], 4), 1.0))
    second = post(handoff.handle(Computed([1, 2], 6), 1.0))
    assert handoff.handle(AbortAsked(ERROR, Role.DECODE), 2.0) == []
    assert handoff.handle(ended(first.batch), 2.0) == []
    aborted, release = handoff.handle(ended(second.batch), 3.0)
    assert isinstance(aborted.message, Aborted)
    assert release == Release(ERROR, Role.DECODE, None)


@pytest.mark.parametrize(
    ("error", "blame"),
    [(PeerUnreachable("gone"), Role.DECODE), (TransferFailed("our engine broke"), Role.PREFILL)],
)
def test_a_failed_write_blames_the_right_leg(error, blame):
    handoff = machine()
    handoff.handle(PeerUp(), 1.0)
    handoff.handle(Granted(Grant(fence(), [7, 8])), 1.0)
    write = post(handoff.handle(Computed([1, 2], 6), 1.0))
    _, release = handoff.handle(ended(write.batch, error), 2.0)
    assert (release.error.code, release.blame) == ("TransferFailed", blame)


def test_a_second_grant_with_other_pages_ends_the_handoff():
    handoff, _ = in_state(SenderState.SENDING)
    handoff.handle(Granted(Grant(fence(), [7, 8])), 2.0)
    assert handoff.state is SenderState.SENDING
    handoff.handle(Granted(Grant(fence(), [7, 9])), 2.0)
    assert handoff.state is SenderState.STOPPING


def test_done_is_said_again_after_a_reconnection_and_given_up_after_the_timeout():
    handoff, _ = in_state(SenderState.HOLDING)
    handoff.handle(PeerDown(), 3.0)
    assert handoff.timer(7.9) is None, "nobody is there to hear a repetition"
    assert handoff.timer(8.0) == DeadlinePassed()
    (again,) = handoff.handle(PeerUp(), 4.0)
    assert isinstance(again.message, Done)
    assert handoff.timer(8.0) == RepeatDue()
    handoff.handle(PeerDown(), 5.0)
    *_, release = handoff.handle(DeadlinePassed(), 10.0)
    assert (release.error.code, release.blame) == ("WorkerLost", Role.DECODE)


@pytest.mark.parametrize(("state", "said"), [(SenderState.OFFERED, Offer), (SenderState.HOLDING, Done)])
def test_what_is_not_answered_is_said_again_ever_more_rarely(state, said):
    handoff, _ = in_state(state)
    times = []
    for tenth in range(600):
        if isinstance(handoff.timer(tenth / 10), RepeatDue):
            (again,) = handoff.handle(RepeatDue(), tenth / 10)
            assert isinstance(again.message, said)
            times.append(tenth / 10)
    pauses = [after - before for before, after in pairwise(times)]
    assert pauses[:3] == [2.0, 4.0, 8.0]
    assert set(pauses[3:]) == {10.0}


@pytest.mark.parametrize(
    ("state", "blame"),
    [(SenderState.OFFERED, Role.DECODE), (SenderState.SENDING, Role.PREFILL), (SenderState.HOLDING, Role.DECODE)],
)
def test_a_connected_handoff_expires_and_blames_who_was_waited_for(state, blame):
    handoff, write = in_state(state)
    assert handoff.timer(EXPIRY - 1) != DeadlinePassed()
    assert handoff.timer(EXPIRY) == DeadlinePassed()
    actions = handoff.handle(DeadlinePassed(), EXPIRY)
    if state is SenderState.SENDING:
        assert actions == [], "a write is under way"
        actions = handoff.handle(ended(write.batch), EXPIRY)
    *_, release = actions
    assert (release.error.code, release.blame) == ("TransferFailed", blame)
    assert handoff.timer(2 * EXPIRY) is None


def test_finish_before_all_tokens_are_computed_is_our_own_bug():
    with pytest.raises(ValueError):
        machine().handle(Finished(42), 2.0)

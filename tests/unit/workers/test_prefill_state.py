"""A prefill attempt's life: each state against each event, and what the shell is asked to do."""

from __future__ import annotations

import itertools

import pytest

from cluster.errors import ErrorInfo, IllegalTransition
from cluster.messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    Fence,
    FinishReason,
    PrefillAttempt,
    Role,
    Sampling,
)
from cluster.timings import HandoffTimings
from prefill_worker import prefill_state as state
from prefill_worker.prefill_state import PrefillMachine, PrefillState

QUEUED, COMPUTING, HOLDING_KV, ABORTING, RELEASED = PrefillState
FENCE = Fence("request", 1, 10, 20)
LOST = ErrorInfo("WorkerLost", "gone")
TIMINGS = HandoffTimings(0.1, 0.2, 0.3, 4, 5)

STARTED = state.Started()
CHUNK = state.ChunkComputed(100)
TOKEN = state.FirstToken(42, None)
LAST_TOKEN = state.FirstToken(2, FinishReason.STOP)
HANDED_OVER = state.HandoffEnded(timings=TIMINGS)
HANDOFF_FAILED = state.HandoffEnded(LOST, Role.DECODE)
CANCELLED = state.Cancelled("client went away")
EVENTS = [STARTED, CHUNK, TOKEN, LAST_TOKEN, HANDED_OVER, HANDOFF_FAILED, CANCELLED]

WAY_TO = {
    QUEUED: [],
    COMPUTING: [STARTED],
    HOLDING_KV: [STARTED, CHUNK, TOKEN],
    ABORTING: [STARTED, CHUNK, CANCELLED],
    RELEASED: [STARTED, CHUNK, TOKEN, HANDED_OVER],
}
AFTERWARDS = {
    (QUEUED, STARTED): COMPUTING,
    (QUEUED, CANCELLED): RELEASED,
    (COMPUTING, CHUNK): COMPUTING,
    (COMPUTING, TOKEN): HOLDING_KV,
    (COMPUTING, LAST_TOKEN): ABORTING,
    (COMPUTING, HANDED_OVER): RELEASED,
    (COMPUTING, HANDOFF_FAILED): RELEASED,
    (COMPUTING, CANCELLED): ABORTING,
    (HOLDING_KV, HANDED_OVER): RELEASED,
    (HOLDING_KV, HANDOFF_FAILED): RELEASED,
    (HOLDING_KV, CANCELLED): ABORTING,
    (ABORTING, HANDED_OVER): RELEASED,
    (ABORTING, HANDOFF_FAILED): RELEASED,
    (ABORTING, CANCELLED): ABORTING,
}


def machine(decode: str | None = "decode-0", way=()) -> PrefillMachine:
    attempt = PrefillAttempt(FENCE, list(range(100)), Sampling(max_tokens=8, seed=1), decode)
    made = PrefillMachine(attempt, 0.0)
    for number, event in enumerate(way):
        made.handle(event, float(number + 1))
    return made


@pytest.mark.parametrize(("before", "event"), list(itertools.product(PrefillState, EVENTS)), ids=str)
def test_each_event_in_each_state(before, event):
    subject = machine(way=WAY_TO[before])
    assert subject.state is before
    expected = AFTERWARDS.get((before, event))
    if expected is None:
        with pytest.raises(IllegalTransition):
            subject.handle(event, 9.0)
        assert subject.state is before
        return
    actions = subject.handle(event, 9.0)
    assert subject.state is expected
    released = [action for action in actions if isinstance(action, state.ReleasePages)]
    last_words = [
        action for action in actions
        if isinstance(action, state.Report) and not isinstance(action.message, AttemptStarted)
    ]  # fmt: skip
    assert len(released) == len(last_words) == (1 if expected is RELEASED else 0), (
        "pages go back once, with a last word"
    )


def test_the_normal_way_and_its_timings():
    subject = machine()
    assert subject.handle(STARTED, 2.0) == [state.Report(AttemptStarted(FENCE, Role.PREFILL)), state.Offer(100)]
    assert subject.handle(CHUNK, 5.0) == [state.Share(100)]
    assert subject.handle(TOKEN, 5.0) == [state.Complete(42)]
    release, report = subject.handle(HANDED_OVER, 6.0)
    assert release == state.ReleasePages()
    message = report.message
    assert isinstance(message, AttemptFinished)
    assert (message.reason, message.handoff) == (FinishReason.HANDED_OFF, TIMINGS)
    assert (message.prefill.queue_seconds, message.prefill.compute_seconds, message.prefill.chunks) == (2.0, 3.0, 1)


def test_a_request_that_ends_with_its_first_token_is_not_handed_over():
    subject = machine(way=[STARTED, CHUNK])
    assert subject.handle(LAST_TOKEN, 3.0) == [state.StopHandoff(state.ENDED_AT_FIRST_TOKEN)]
    _, report = subject.handle(HANDOFF_FAILED, 4.0)
    assert report.message.reason is FinishReason.STOP


def test_without_a_decode_leg_nothing_is_offered_and_the_first_token_is_the_last():
    subject = machine(decode=None)
    assert subject.handle(STARTED, 1.0) == [state.Report(AttemptStarted(FENCE, Role.PREFILL))]
    assert subject.handle(CHUNK, 2.0) == []
    release, report = subject.handle(state.FirstToken(5, FinishReason.LENGTH), 2.0)
    assert (release, report.message.reason) == (state.ReleasePages(), FinishReason.LENGTH)
    assert subject.state is RELEASED


def test_a_cancel_without_a_decode_leg_releases_at_once():
    subject = machine(decode=None, way=[STARTED])
    drop, release, report = subject.handle(CANCELLED, 2.0)
    assert (drop, release) == (state.DropSequence(), state.ReleasePages())
    assert report.message.reason is FinishReason.CANCELLED


def test_a_lost_handoff_while_computing_drops_the_sequence_and_blames_the_right_leg():
    drop, release, report = machine(way=[STARTED]).handle(HANDOFF_FAILED, 2.0)
    assert (drop, release) == (state.DropSequence(), state.ReleasePages())
    assert report.message == AttemptFailed(FENCE, Role.PREFILL, Role.DECODE, LOST)


def test_pages_of_a_cancelled_attempt_stay_until_the_handoff_has_ended():
    subject = machine(way=[STARTED, CHUNK])
    assert subject.handle(CANCELLED, 3.0) == [
        state.DropSequence(),
        state.StopHandoff(ErrorInfo("Cancelled", "client went away")),
    ]
    _, report = subject.handle(HANDOFF_FAILED, 4.0)
    assert report.message.reason is FinishReason.CANCELLED

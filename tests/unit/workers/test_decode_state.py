"""A decode attempt's life: each state against each event, and what the shell is asked to do."""

from __future__ import annotations

import itertools

import pytest

from cluster.errors import ErrorInfo, IllegalTransition
from cluster.messages import (
    AttemptFailed,
    AttemptStarted,
    DecodeAttempt,
    Fence,
    FinishReason,
    Role,
    Sampling,
)
from decode_worker import decode_state as state
from decode_worker.decode_state import DecodeMachine, DecodeState

RESERVING, OFFERED, AWAITING_KV, PREFILLING, RUNNING, FINISHED = DecodeState
FENCE = Fence("request", 1, 10, 20)

OFFER = state.OfferArrived()
LEASED = state.PagesLeased()
KV = state.KVArrived(42, 0.01)
FAILED = state.HandoffFailed(ErrorInfo("TransferFailed", "damaged"), Role.PREFILL)
PREFILL_STARTED = state.PrefillStarted()
CHUNK = state.ChunkComputed()
SAMPLED = state.Sampled(4, None)
LAST = state.Sampled(2, FinishReason.LENGTH)
RETRACTED = state.Retracted()
CANCELLED = state.Cancelled("client went away")
EVENTS = [OFFER, LEASED, KV, FAILED, PREFILL_STARTED, CHUNK, SAMPLED, LAST, RETRACTED, CANCELLED]

WAY_TO = {
    RESERVING: [],
    OFFERED: [OFFER],
    AWAITING_KV: [OFFER, LEASED],
    RUNNING: [OFFER, LEASED, KV],
    FINISHED: [OFFER, LEASED, KV, LAST],
    PREFILLING: [],
}
AFTERWARDS = {
    (RESERVING, OFFER): OFFERED,
    (RESERVING, FAILED): FINISHED,
    (RESERVING, CANCELLED): FINISHED,
    (OFFERED, LEASED): AWAITING_KV,
    (OFFERED, FAILED): FINISHED,
    (OFFERED, CANCELLED): FINISHED,
    (AWAITING_KV, KV): RUNNING,
    (AWAITING_KV, FAILED): FINISHED,
    (AWAITING_KV, CANCELLED): FINISHED,
    (PREFILLING, PREFILL_STARTED): PREFILLING,
    (PREFILLING, CHUNK): PREFILLING,
    (PREFILLING, SAMPLED): RUNNING,
    (PREFILLING, LAST): FINISHED,
    (PREFILLING, RETRACTED): FINISHED,
    (PREFILLING, CANCELLED): FINISHED,
    (RUNNING, SAMPLED): RUNNING,
    (RUNNING, LAST): FINISHED,
    (RUNNING, RETRACTED): FINISHED,
    (RUNNING, CANCELLED): FINISHED,
}


def machine(prefill: str | None = "prefill-0", way=()) -> DecodeMachine:
    made = DecodeMachine(DecodeAttempt(FENCE, list(range(100)), Sampling(max_tokens=8, seed=1), prefill), 0.0)
    for number, event in enumerate(way):
        made.handle(event, float(number + 1))
    return made


@pytest.mark.parametrize(("before", "event"), list(itertools.product(DecodeState, EVENTS)), ids=str)
def test_each_event_in_each_state(before, event):
    subject = machine(prefill=None if before is PREFILLING else "prefill-0", way=WAY_TO[before])
    assert subject.state is before
    expected = AFTERWARDS.get((before, event))
    if expected is None:
        with pytest.raises(IllegalTransition):
            subject.handle(event, 9.0)
        assert subject.state is before
        return
    actions = subject.handle(event, 9.0)
    assert subject.state is expected
    last_words = [
        action for action in actions
        if isinstance(action, state.Report) and not isinstance(action.message, AttemptStarted)
    ]  # fmt: skip
    assert len(last_words) == (1 if expected is FINISHED else 0)


@pytest.mark.parametrize("event", [FAILED, CANCELLED])
def test_leased_pages_are_never_released_but_quarantined(event):
    actions = machine(way=WAY_TO[AWAITING_KV]).handle(event, 3.0)
    assert state.QuarantinePages() in actions
    assert state.ReleasePages() not in actions


@pytest.mark.parametrize("event", [FAILED, CANCELLED])
@pytest.mark.parametrize("before", [RESERVING, OFFERED])
def test_an_attempt_without_pages_gives_none_back(before, event):
    actions = machine(way=WAY_TO[before]).handle(event, 3.0)
    assert not {type(action) for action in actions} & {state.QuarantinePages, state.ReleasePages}


def test_a_cancel_after_the_offer_tells_the_writer():
    for before in (OFFERED, AWAITING_KV):
        actions = machine(way=WAY_TO[before]).handle(CANCELLED, 3.0)
        assert state.StopHandoff(ErrorInfo("Cancelled", "client went away")) in actions


def test_the_normal_way_and_its_timings():
    subject = machine(way=[OFFER, LEASED])
    assert subject.handle(KV, 3.0) == [state.Submit(42), state.Report(AttemptStarted(FENCE, Role.DECODE))]
    assert subject.handle(SAMPLED, 4.0) == []
    release, report = subject.handle(LAST, 5.0)
    assert release == state.ReleasePages()
    timings = report.message.decode
    assert (timings.await_seconds, timings.decode_seconds, timings.steps, timings.batch_sum) == (3.0, 2.0, 2, 6)
    assert timings.prefill is None


def test_unified_begins_with_its_own_prefill_and_reports_it():
    subject = machine(prefill=None)
    assert subject.begin() == [state.Submit(None)]
    assert subject.handle(PREFILL_STARTED, 1.0) == [state.Report(AttemptStarted(FENCE, Role.DECODE))]
    subject.handle(CHUNK, 2.0)
    subject.handle(CHUNK, 3.0)
    subject.handle(SAMPLED, 3.0)
    _, report = subject.handle(LAST, 5.0)
    prefill = report.message.decode.prefill
    assert (prefill.queue_seconds, prefill.compute_seconds, prefill.chunks, prefill.tokens) == (1.0, 2.0, 2, 100)
    assert report.message.decode.steps == 1, "the first token came from prefill"


@pytest.mark.parametrize("before", [RESERVING, OFFERED, AWAITING_KV])
def test_a_prefill_leg_that_needs_no_decode_is_no_failure(before):
    ended = state.HandoffFailed(ErrorInfo("FinishedEarly", "one token was enough"), None)
    *_, report = machine(way=WAY_TO[before]).handle(ended, 3.0)
    assert report.message.reason is FinishReason.CANCELLED


def test_a_failure_carries_its_error_and_the_leg_to_blame():
    *_, report = machine(way=WAY_TO[AWAITING_KV]).handle(FAILED, 3.0)
    assert report.message == AttemptFailed(FENCE, Role.DECODE, Role.PREFILL, FAILED.error)


def test_a_retracted_attempt_gives_its_pages_back_and_says_what_it_has_done():
    release, report = machine(way=[*WAY_TO[RUNNING], SAMPLED, SAMPLED]).handle(RETRACTED, 9.0)
    assert release == state.ReleasePages()
    assert (report.message.reason, report.message.decode.steps) == (FinishReason.RETRACTED, 2)

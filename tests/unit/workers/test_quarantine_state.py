"""The watch over pages in quarantine: when a decode worker gives up waiting, and what it does then."""

import pytest

from decode_worker.quarantine_state import Counted, End, QuarantineState, QuarantineWatch, Warn

CALM, CROWDED = Counted(50, 3), Counted(51, 3)


def watch(state: QuarantineState = QuarantineState.OPEN) -> QuarantineWatch:
    """Of 100 pages, in that state since 0."""
    found = QuarantineWatch(100, 0.5, patience_seconds=30.0, drain_seconds=60.0)
    if state is not QuarantineState.OPEN:
        found.handle(CROWDED, -30.0 if state is QuarantineState.CLOSING else 0.0)
    if state is QuarantineState.CLOSING:
        found.handle(CROWDED, 0.0)
    assert found.state is state
    return found


@pytest.mark.parametrize("state", [QuarantineState.OPEN, QuarantineState.CROWDED, QuarantineState.CLOSING])
def test_pages_that_come_back_end_it_at_any_time(state):
    waiting = watch(state)
    assert all(isinstance(action, Warn) for action in waiting.handle(CALM, 100.0))
    assert waiting.state is QuarantineState.OPEN
    assert not waiting.closing


def test_a_crowd_is_told_once_and_borne_for_a_while():
    waiting = watch()
    (warning,) = waiting.handle(CROWDED, 0.0)
    assert "51 of 100" in warning.message
    assert waiting.handle(CROWDED, 29.9) == []
    assert not waiting.closing
    assert isinstance(waiting.handle(CROWDED, 30.0)[0], Warn)
    assert waiting.closing


def test_a_closing_worker_ends_when_nothing_runs_any_more():
    waiting = watch(QuarantineState.CLOSING)
    assert waiting.handle(CROWDED, 59.0) == []
    (end,) = waiting.handle(Counted(51, 0), 59.1)
    assert isinstance(end, End)
    assert end.error.retryable
    assert waiting.handle(CALM, 60.0) == [], "it ends once"


def test_a_closing_worker_does_not_drain_for_ever():
    (end,) = watch(QuarantineState.CLOSING).handle(CROWDED, 60.0)
    assert "3 attempts" in end.error.message

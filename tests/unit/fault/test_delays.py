"""Which fault a client has waited for, and how long."""

import pytest

from tests.fault.campaign import Strike
from tests.fault.delays import Delay, delays
from tests.fault.plan import Fault, Kind, Lane, Moment
from tests.fault.questions import Question
from tests.fault.reading import Reading
from tests.fault.watch import AttemptRecord, ChoiceRecord, RequestRecord


def strike(kind, victim, at):
    return Strike(Fault(Lane.DECODE, kind, Moment.DECODING), victim, at, None, None)


def reading(arrivals, sent_at=100.0):
    found = Reading("r", Question("q", "/", {}))
    found.sent_at, found.arrivals, found.ended_at = sent_at, [arrivals], arrivals[-1]
    return found


def attempt(decode, placed, ended, tokens):
    return AttemptRecord("prefill-0", decode, placed, ended, tokens, "worker_lost" if ended else None, None, None)


def record(*attempts):
    choice = ChoiceRecord(0.0, 0.0, "prefill-0", "decode-0", list(attempts))
    return RequestRecord(0.0, 0.0, "prefill-0", "decode-0", list(attempts), choices=[choice])


def test_a_death_costs_the_time_until_the_next_attempt_s_first_token():
    found = delays(
        reading([101.0, 102.0, 104.5, 105.0]),
        record(attempt("decode-0", 0.5, 2.25, 2), attempt("decode-1", 2.5, None, 2)),
        [strike(Kind.KILL_ENGINE, "decode-1", 90.0), strike(Kind.KILL_WORKER, "decode-0", 102.125)],
    )
    assert found == [Delay(Kind.KILL_WORKER, pytest.approx(2.375), pytest.approx(2.0))]


def test_several_attempts_after_one_fault_are_one_delay():
    found = delays(
        reading([101.0, 106.0]),
        record(attempt("decode-0", 0.5, 2.25, 1), attempt("decode-0", 2.5, 3.0, 0), attempt("decode-1", 3.5, None, 1)),
        [strike(Kind.DEAFEN, "decode-0", 102.0)],
    )
    assert found == [Delay(Kind.DEAFEN, pytest.approx(4.0), pytest.approx(2.5))]


def test_what_no_fault_caused_is_no_delay():
    story = record(attempt("decode-0", 0.5, 2.25, 1), attempt("decode-1", 2.5, None, 1))
    assert delays(reading([101.0, 104.0]), story, [strike(Kind.CUT, "decode-1", 102.0)]) == []
    assert delays(reading([101.0, 104.0]), None, [strike(Kind.CUT, "decode-1", 102.0)]) == []


def test_the_router_s_death_concerns_whoever_reads_and_its_successor_s_record_only_tells_of_later():
    story = record(attempt("decode-0", 0.25, 1.0, 1), attempt("decode-1", 1.25, None, 1))
    whole = reading([101.0, 108.0, 109.0])
    found = delays(whole, story, [strike(Kind.KILL_ROUTER, "router", 102.0)])
    assert found == [Delay(Kind.KILL_ROUTER, pytest.approx(6.0), 0.0)]

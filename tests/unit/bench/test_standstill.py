"""The clock that stands still with the machine, what is measured by it, and the witness that tells."""

import os
import signal
import time

import pytest

from bench.client import Timeline
from bench.goodput.outcome import Objective, judge
from bench.load import SHORT, Observed
from bench.measure import measure
from bench.standstill import Standstills, Witness


def test_only_when_no_core_runs_does_the_machine_stand_still():
    first = [(1.0, 2.0), (5.0, 6.0), (8.0, 8.5)]
    second = [(0.5, 1.5), (1.8, 5.2), (9.0, 9.1)]
    assert Standstills.of_all([first, second]).intervals == [(1.0, 1.5), (1.8, 2.0), (5.0, 5.2)]
    assert Standstills.of_all([first]).intervals == first
    assert Standstills.of_all([first, []]).intervals == Standstills.of_all([]).intervals == []


@pytest.mark.parametrize(
    ("moment", "running"),
    [(0.5, 0.5), (1.0, 1.0), (1.25, 1.0), (1.5, 1.0), (2.5, 2.0), (3.1, 2.5), (3.25, 2.5), (4.0, 3.25)],
)
def test_its_clock_loses_just_that_time(moment, running):
    assert Standstills([(3.0, 3.25), (1.0, 1.5)]).running(moment) == pytest.approx(running)


def test_those_of_a_window_are_those_that_began_in_it():
    stills = Standstills([(1.0, 1.5), (3.0, 3.25)])
    assert stills.within(1.0, 3.0) == [0.5] and stills.longest == 0.5
    assert Standstills([]).longest == 0.0


def line(*arrivals):
    return Timeline(
        stream=SHORT, prompt_tokens=10, sent_at=0.0, arrivals=list(arrivals), counts=[1] * len(arrivals),
        finish_reason="length", ended_at=arrivals[-1],
    )  # fmt: skip


def test_gaps_are_told_by_both_clocks():
    """Of three gaps of 40 ms one took 240 ms, in 200 of which the machine stood still."""
    observed = Observed([line(1.0, 1.04, 1.28, 1.32)], 0.0, 2.0)
    stills = Standstills([(1.06, 1.26)])
    figures = measure(observed, [], {}, standstills=stills).figures
    assert figures["inter_token_p50"] == pytest.approx(40) and figures["inter_token_p99"] > 200
    assert figures["running_inter_token_p99"] == pytest.approx(40)
    assert figures["running_inter_token_p99_over_p50"] == pytest.approx(1)
    assert figures["standstill_longest"] == pytest.approx(200) and figures["standstill_share"] == pytest.approx(10)
    assert "running_inter_token_p99" not in measure(observed, [], {}).figures, "nobody can tell"


def test_a_standstill_spoils_no_request():
    lines = [line(1.0, 1.04, 1.28), line(1.0, 1.2)]
    outcome = judge(1.0, lines, 2.0, Objective(), standstills=Standstills([(1.06, 1.26)]))
    assert (outcome.good_share, outcome.running_good_share, outcome.fair_share) == (0.0, 1.0, 1.0)
    assert judge(1.0, lines, 2.0, Objective()).fair_share == 0.0


def test_a_witness_that_did_not_run_tells_of_a_standstill():
    """To its threads, SIGSTOP is what a host that takes the cores away is."""
    begun = time.monotonic()
    with Witness() as witness:
        child = witness.pid
        os.kill(child, signal.SIGSTOP)
        os.waitid(os.P_PID, child, os.WSTOPPED)
        stopped = time.monotonic()
        while time.monotonic() < stopped + 0.02:
            pass
        resumed = time.monotonic()
        os.kill(child, signal.SIGCONT)
    if witness.standstills is None:
        pytest.skip("real-time threads are not allowed here")
    found = [each for each in witness.standstills.intervals if each[1] > stopped]
    assert begun < found[0][0] <= stopped + 0.005 and found[0][1] >= resumed

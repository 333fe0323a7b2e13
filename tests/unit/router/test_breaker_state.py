"""Who fails others again and again is left alone for a while, and gets a chance to show that it is well."""

import pytest

from cluster.config import Recovery
from cluster.errors import IllegalTransition
from cluster.messages import Fence, Role
from router.breaker_state import (
    BURST_SECONDS,
    BreakerMachine,
    BreakerState,
    LegBegan,
    LegBlamed,
    LegEnded,
    LegProved,
    LegSucceeded,
    Opened,
    Reclosed,
)
from router.breakers import Breakers

LIMITS = Recovery(breaker_failures=3, breaker_seconds=2.0, longest_breaker_seconds=5.0)
OLD, PROBE, NEXT = Fence("old", 1, 1, 1), Fence("probe", 1, 1, 1), Fence("next", 1, 1, 1)
LEG = ("decode-0", Role.DECODE)


def opened(at: float = 10.0) -> BreakerMachine:
    """Shut by its third failure, at `at`."""
    machine = BreakerMachine("decode-0", LIMITS)
    for number in range(3):
        assert not machine.shut(at)
        actions = machine.handle(LegBlamed(OLD), at - 2 + number)
    assert actions == [Opened(2.0)]
    return machine


def probing(at: float = 12.0) -> BreakerMachine:
    machine = opened(at - 2.0)
    assert machine.handle(LegBegan(PROBE), at) == []
    assert machine.state is BreakerState.HALF_OPEN
    return machine


def test_every_state_takes_every_event_and_nothing_else():
    events = {LegBegan, LegProved, LegSucceeded, LegBlamed, LegEnded}
    assert set(BreakerMachine.TABLE) == {(state, event) for state in BreakerState for event in events}
    with pytest.raises(IllegalTransition):
        BreakerMachine("decode-0", LIMITS).handle("a word", 0.0)


def test_failures_in_a_row_open_it_and_a_success_between_forgives():
    machine = BreakerMachine("decode-0", LIMITS)
    for now in (0.0, 1.0):
        machine.handle(LegBlamed(OLD), now)
    machine.handle(LegSucceeded(OLD), 1.5)
    assert machine.healthy
    for now in (2.0, 3.0):
        assert machine.handle(LegBlamed(OLD), now) == []
    assert machine.handle(LegBlamed(OLD), 4.0) == [Opened(2.0)]


def test_what_breaks_many_attempts_at_once_is_one_failure():
    machine = BreakerMachine("decode-0", LIMITS)
    for number in range(64):
        assert machine.handle(LegBlamed(OLD), number * BURST_SECONDS / 64) == []
    assert not machine.shut(1.0)
    machine.handle(LegBlamed(OLD), BURST_SECONDS)
    assert machine.handle(LegBlamed(OLD), 2 * BURST_SECONDS) == [Opened(2.0)]


def test_it_is_shut_for_its_time_then_one_attempt_goes_there():
    machine = opened(at=10.0)
    assert machine.shut(11.9) and not machine.shut(12.0)
    machine.handle(LegBegan(OLD), 11.0)
    assert machine.state is BreakerState.OPEN, "the only worker left is no probe"
    machine.handle(LegBegan(PROBE), 12.0)
    assert machine.shut(12.0) and machine.shut(1000.0), "one is enough"


@pytest.mark.parametrize("well", [LegProved, LegSucceeded])
def test_a_probe_that_goes_well_brings_it_back_on_trial(well):
    machine = probing()
    assert machine.handle(well(PROBE), 13.0) == [Reclosed()]
    assert not machine.shut(13.0)
    if well is LegSucceeded:
        assert machine.healthy
    else:
        assert machine.handle(LegBlamed(PROBE), 14.0) == [Opened(4.0)], "it had not shown much"


def test_a_probe_that_fails_shuts_it_for_twice_as_long_up_to_a_bound():
    machine, found, now = probing(12.0), [], 12.0
    for _ in range(3):
        (action,) = machine.handle(LegBlamed(PROBE), now)
        found.append(action.seconds)
        now += action.seconds
        machine.handle(LegBegan(PROBE), now)
    assert found == [4.0, 5.0, 5.0]


def test_those_that_were_there_before_can_only_speak_for_it():
    machine = probing()
    for event in (LegBlamed(OLD), LegEnded(OLD), LegBegan(OLD)):
        assert machine.handle(event, 12.5) == []
        assert machine.state is BreakerState.HALF_OPEN
    assert machine.handle(LegProved(OLD), 12.6) == [Reclosed()]
    assert opened().handle(LegSucceeded(OLD), 10.5) == [Reclosed()]
    assert opened().handle(LegBlamed(OLD), 10.5) == []


def test_a_probe_that_shows_nothing_lets_the_next_one_be_it():
    machine = probing()
    machine.handle(LegEnded(PROBE), 12.5)
    assert not machine.shut(12.5)
    machine.handle(LegBegan(NEXT), 12.6)
    assert machine.shut(12.6)
    assert machine.handle(LegSucceeded(NEXT), 12.7) == [Reclosed()]


def test_legs_of_one_worker_are_told_apart_and_the_well_ones_cost_nothing():
    breakers = Breakers(LIMITS)
    for now in (0.0, 1.0, 2.0):
        breakers.handle(LEG, LegBlamed(OLD), now)
    breakers.handle(("decode-0", Role.PREFILL), LegBlamed(OLD), 2.0)
    assert breakers.shut(2.0) == {LEG}
    assert breakers.state(LEG) is BreakerState.OPEN
    breakers.handle(LEG, LegSucceeded(OLD), 3.0)
    assert breakers.shut(3.0) == frozenset()
    breakers.handle(("decode-1", Role.DECODE), LegBegan(OLD), 3.0)
    assert breakers.state(("decode-1", Role.DECODE)) is BreakerState.CLOSED

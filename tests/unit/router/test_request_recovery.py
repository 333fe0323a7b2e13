"""How often a choice gets another attempt, and how soon; what it waits for, and what ends the wait."""

import pytest

from cluster.config import Recovery
from cluster.errors import (
    AttemptsExhausted,
    DeadlineExceeded,
    WorkerSilent,
)
from cluster.messages import Role, Sampling
from router.request_state import (
    Fail,
    LegStalled,
    NotPlaced,
    PlaceAgain,
    Placed,
    RequestMachine,
    RequestState,
    StopMatched,
    WorkerKey,
)
from tests.unit.router.test_request_state import (
    DEADLINE,
    DECODE_FAILED,
    DECODE_LOST,
    DECODE_STARTED,
    DECODED,
    GONE,
    NOT_PLACED,
    PLACED,
    PREFILL_FAILED,
    STARTED,
    D,
    P,
    failing,
    kinds,
    machine_after,
    token,
)

BUDGET = Recovery(max_attempts=6, max_attempts_without_progress=4, first_delay_seconds=0.5, longest_delay_seconds=0.8)


def test_attempts_without_progress_come_later_and_later_and_are_bounded():
    machine = RequestMachine("r-0", [1], Sampling(max_tokens=8, seed=1), 0, BUDGET)
    delays = []
    for _ in range(3):
        machine.handle(PLACED, 1.0)
        delays.append(machine.handle(DECODE_FAILED, 1.0)[-1].after_seconds)
    assert delays == [0.0, 0.5, 0.8]
    machine.handle(PLACED, 1.0)
    machine.handle(DECODE_STARTED, 1.0)
    (fail,) = (action for action in machine.handle(DECODE_LOST, 1.0) if isinstance(action, Fail))
    assert isinstance(fail.error, AttemptsExhausted) and fail.blame is Role.DECODE
    assert fail.error.message == "4 attempts failed; the last word was WorkerLost: gone"


def test_what_no_request_does_to_a_worker_is_not_held_against_one():
    """It falls silent, or is lost before it has begun: that may happen as often as attempts there are in all."""
    budget = Recovery(max_attempts=6, max_attempts_without_progress=1)
    silent = LegStalled(Role.DECODE, WorkerSilent("nothing is heard"))
    machine = RequestMachine("r-0", [1], Sampling(max_tokens=8, seed=1), 0, budget)
    for begun, loss in ((True, silent), (False, DECODE_LOST), (True, silent), (False, DECODE_LOST)):
        machine.handle(PLACED, 1.0)
        if begun:
            machine.handle(DECODE_STARTED, 1.0)
        assert kinds(machine.handle(loss, 1.0))[-1] == "PlaceAgain"
    machine.handle(PLACED, 1.0)
    machine.handle(DECODE_STARTED, 1.0)
    machine.handle(DECODE_LOST, 1.0)
    assert machine.state is RequestState.FAILED, "this time it may have been the request"


def test_a_first_token_alone_is_no_progress_and_a_second_one_forgives():
    machine = RequestMachine("r-0", [1], Sampling(max_tokens=99, seed=1), 0, BUDGET)
    for number in range(2):
        machine.handle(PLACED, 1.0)
        machine.handle(token(number), 1.0)
        again = machine.handle(DECODE_FAILED, 1.0)[-1]
    assert again.after_seconds == 0.5, "prefill gives one token an attempt, whatever becomes of the handoff"
    machine.handle(PLACED, 1.0)
    machine.handle(token(2), 1.0)
    machine.handle(token(3), 1.0)
    again = machine.handle(DECODE_LOST, 1.0)[-1]
    assert (again.after_seconds, again.avoid) == (0.0, {D}), "and P, which was blamed before, is wanted again"


def test_attempts_in_all_are_bounded_too():
    machine = RequestMachine("r-0", [1], Sampling(max_tokens=99, seed=1), 0, BUDGET)
    for number in range(0, 12, 2):
        machine.handle(PLACED, 1.0)
        machine.handle(token(number), 1.0)
        machine.handle(token(number + 1), 1.0)
        machine.handle(DECODE_LOST, 1.0)
    assert machine.state is RequestState.FAILED and machine.delivered == 12


def test_all_that_were_to_blame_are_avoided_until_the_request_gets_on():
    other = WorkerKey("decode-1", 33)
    machine, _ = failing(PLACED, DECODE_LOST)
    machine.handle(Placed(P, other), 1.0)
    assert machine.handle(DECODE_FAILED, 1.0)[-1].avoid == {D, P}
    machine.handle(Placed(P, other), 1.0)
    again = machine.handle(DECODE_LOST, 1.0)[-1]
    assert (again.avoid, again.keep) == ({D, P, other}, frozenset())


def test_without_a_place_it_looks_again_and_again_and_that_is_no_failure():
    machine, _ = failing(PLACED, STARTED, token(0), DECODE_LOST, budget=BUDGET)
    looks = [machine.handle(NOT_PLACED, float(now)) for now in range(2000)]
    assert [again.after_seconds for (again,) in looks[:3]] == [0.5, 0.8, 0.8]
    assert looks[-1] == looks[2] == [PlaceAgain(0.8, frozenset({D}), frozenset({P}))]
    machine.handle(PLACED, 9.0)
    assert machine.state is RequestState.PLACED


@pytest.mark.parametrize(
    ("event", "state", "end"),
    [
        (GONE, RequestState.CANCELLED, []),
        (DEADLINE, RequestState.FAILED, ["Fail"]),
        (StopMatched(), RequestState.FINISHED, ["Finish"]),
    ],
    ids=["client-gone", "deadline", "stop"],
)
def test_while_it_waits_for_a_place_it_can_end(event, state, end):
    machine, _ = failing(PLACED, STARTED, token(0), DECODE_LOST, NOT_PLACED)
    actions = machine.handle(event, 9.0)
    assert machine.state is state and kinds(actions) == [*end, "Forget"]


def test_a_first_attempt_waits_for_workers_only_where_some_are_expected():
    expected = NotPlaced(NOT_PLACED.error, expected=True)
    machine, actions = machine_after([expected])
    assert actions == [PlaceAgain(0.1, frozenset(), frozenset())] and machine.state is RequestState.UNPLACED
    assert kinds(machine.handle(expected, 1.0)) == ["PlaceAgain"]
    assert kinds(machine.handle(NOT_PLACED, 2.0)) == ["Fail", "Forget"]


def test_a_deadline_tells_what_went_wrong_before_it():
    machine, _ = failing(PLACED, STARTED, token(0), DECODE_LOST, PLACED, PREFILL_FAILED)
    machine.handle(NOT_PLACED, 3.0)
    fail = machine.handle(DEADLINE, 60.0)[0]
    assert isinstance(fail.error, DeadlineExceeded)
    assert fail.error.message == (
        "the request was not done within 60 s "
        "(1 tokens sent; 2 attempts failed; the last word was NoWorker: no decode worker is live)"
    )


def test_a_deadline_also_ends_the_wait_for_timings():
    machine, _ = machine_after([PLACED, STARTED, token(0), DECODE_STARTED, DECODED])
    assert kinds(machine.handle(DEADLINE, 60.0)) == ["Cancel", "Release", "Forget"]
    assert machine.handle(DEADLINE, 61.0) == []

"""The life of one choice: every state with every event, failures, further attempts. See also test_request_orders.py and
test_request_recovery.py."""

import pytest

from cluster.config import Recovery
from cluster.errors import (
    Draining,
    IllegalTransition,
    InvalidRequest,
    LayoutMismatch,
    NoWorker,
    ProtocolError,
    StaleFence,
    TransferFailed,
    WorkerLost,
    WorkerStalled,
)
from cluster.messages import (
    DecodeAttempt,
    Emitted,
    Fence,
    FinishReason,
    PrefillAttempt,
    Role,
    Sampling,
)
from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings
from router.recovery import Interruption
from router.request_state import (
    AttemptOver,
    Cancel,
    ClientGone,
    DeadlinePassed,
    Deliver,
    Dispatch,
    Fail,
    Finish,
    LegFailed,
    LegFinished,
    LegLost,
    LegStalled,
    LegStarted,
    NotPlaced,
    PlaceAgain,
    Placed,
    Release,
    RequestMachine,
    RequestState,
    StopMatched,
    TokensArrived,
    WorkerKey,
)

P, D = WorkerKey("prefill-0", 11), WorkerKey("decode-0", 22)
FENCE = Fence("r-0", 1, 11, 22)
PREFILL = PrefillTimings(0.1, 0.2, 5, 0, 1)
HANDOFF = HandoffTimings(0.1, 0.2, 0.3, 1, 1024)
DECODE = DecodeTimings(0.1, 0.2, 3, 3)


def token(offset: int) -> TokensArrived:
    return TokensArrived([Emitted(FENCE, offset, 100 + offset)])


STARTED = LegStarted(Role.PREFILL)
DECODE_STARTED = LegStarted(Role.DECODE)
HANDED_OFF = LegFinished(Role.PREFILL, FinishReason.HANDED_OFF, PREFILL, HANDOFF)
DECODED = LegFinished(Role.DECODE, FinishReason.LENGTH, decode=DECODE)
PREFILL_FAILED = LegFailed(Role.PREFILL, Role.DECODE, TransferFailed("refused"))
DECODE_FAILED = LegFailed(Role.DECODE, Role.PREFILL, TransferFailed("damaged"))
PREFILL_LOST = LegLost(Role.PREFILL, WorkerLost("gone"))
DECODE_LOST = LegLost(Role.DECODE, WorkerLost("gone"))
PREFILL_STALLED = LegStalled(Role.PREFILL, WorkerStalled("silent"))
DECODE_STALLED = LegStalled(Role.DECODE, WorkerStalled("silent"))
REFUSED = LegFailed(Role.PREFILL, Role.PREFILL, InvalidRequest("a defect, said politely"))
RETRACTED = LegFinished(Role.DECODE, FinishReason.RETRACTED, decode=DECODE)
GONE, DEADLINE = ClientGone("bye"), DeadlinePassed(60)
PLACED = Placed(P, D)
NOT_PLACED = NotPlaced(NoWorker("no decode worker is live"))

PATHS = {
    RequestState.UNPLACED: [],
    RequestState.PLACED: [PLACED],
    RequestState.PREFILLING: [PLACED, STARTED],
    RequestState.STREAMING: [PLACED, STARTED, token(0)],
    RequestState.FINISHED: [PLACED, STARTED, token(0), token(1), DECODED],
    RequestState.FAILED: [PLACED, STARTED, REFUSED],
    RequestState.CANCELLED: [PLACED, GONE],
}
EVENTS = [
    PLACED, NOT_PLACED, STARTED, token(0), HANDED_OFF, PREFILL_FAILED, PREFILL_LOST, PREFILL_STALLED,
    StopMatched(), GONE, DEADLINE,
]  # fmt: skip
UNPLACED_TAKES = (Placed, NotPlaced, StopMatched, ClientGone, DeadlinePassed)
ACTIVE = (RequestState.PLACED, RequestState.PREFILLING, RequestState.STREAMING)


def machine_after(events, sampling: Sampling | None = None, *, again: Placed | None = None) -> tuple:
    """`again`: where each next attempt is placed, at once."""
    machine = RequestMachine("r-0", [1, 2, 3], sampling or Sampling(max_tokens=8, seed=1))
    actions = []
    for number, event in enumerate(events):
        actions += machine.handle(event, float(number))
        if again is not None and isinstance(actions[-1] if actions else None, PlaceAgain):
            actions += machine.handle(again, float(number))
    return machine, actions


def kinds(actions) -> list[str]:
    return [type(action).__name__ for action in actions]


# --- every state with every event ------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", PATHS, ids=lambda state: state.name)
def test_each_event_in_each_state_is_in_the_table_or_refused(state, event):
    machine, _ = machine_after(PATHS[state])
    assert machine.state is state
    first = state is RequestState.UNPLACED
    legal = isinstance(event, UNPLACED_TAKES) if first else not isinstance(event, Placed | NotPlaced)
    assert machine.accepts(type(event)) is legal
    if legal:
        machine.handle(event, 9.0)
    else:
        with pytest.raises(IllegalTransition, match="r-0"):
            machine.handle(event, 9.0)
        assert machine.state is state


EXPECTED = {
    (RequestState.UNPLACED, "Placed"): RequestState.PLACED,
    (RequestState.UNPLACED, "NotPlaced"): RequestState.FAILED,
    (RequestState.UNPLACED, "StopMatched"): RequestState.FINISHED,
    (RequestState.UNPLACED, "ClientGone"): RequestState.CANCELLED,
    (RequestState.UNPLACED, "DeadlinePassed"): RequestState.FAILED,
    (RequestState.PLACED, "LegStarted"): RequestState.PREFILLING,
    **{(state, "TokensArrived"): RequestState.STREAMING for state in ACTIVE},
    **{(state, "LegFailed"): RequestState.UNPLACED for state in ACTIVE},
    **{(state, "LegLost"): RequestState.UNPLACED for state in ACTIVE},
    **{(state, "LegStalled"): RequestState.UNPLACED for state in ACTIVE},
    **{(state, "StopMatched"): RequestState.FINISHED for state in ACTIVE},
    **{(state, "ClientGone"): RequestState.CANCELLED for state in ACTIVE},
    **{(state, "DeadlinePassed"): RequestState.FAILED for state in ACTIVE},
}


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", PATHS, ids=lambda state: state.name)
def test_where_each_event_leads(state, event):
    machine, _ = machine_after(PATHS[state])
    if machine.accepts(type(event)):
        machine.handle(event, 9.0)
        assert machine.state is EXPECTED.get((state, type(event).__name__), state)


# --- the ordinary life -----------------------------------------------------------------------------------------------


def test_both_legs_get_the_same_fence_and_each_others_name():
    machine, (to_decode, to_prefill) = machine_after([PLACED])
    sampling = Sampling(max_tokens=8, seed=1)
    assert to_decode == Dispatch(Role.DECODE, D, DecodeAttempt(FENCE, [1, 2, 3], sampling, "prefill-0"))
    assert to_prefill == Dispatch(Role.PREFILL, P, PrefillAttempt(FENCE, [1, 2, 3], sampling, "decode-0"))
    assert machine.fence == FENCE


def test_one_leg_alone_has_no_epoch_of_the_other():
    _, (only,) = machine_after([Placed(P, None)])
    assert (only.attempt.decode, only.attempt.fence) == (None, Fence("r-0", 1, 11, 0))
    _, (only,) = machine_after([Placed(None, D)])
    assert (only.attempt.prefill, only.attempt.fence) == (None, Fence("r-0", 1, 0, 22))


def test_a_request_ends_with_its_last_token_and_waits_for_timings_only():
    machine, actions = machine_after([PLACED, STARTED, token(0), DECODE_STARTED, token(1), DECODED])
    assert kinds(actions[2:]) == ["Deliver", "Deliver", "Release", "Finish"]
    assert machine.state is RequestState.FINISHED
    assert kinds(machine.handle(HANDED_OFF, 9.0)) == ["Release", "Forget"]
    assert (machine.timings.prefill, machine.timings.handoff, machine.timings.decode) == (PREFILL, HANDOFF, DECODE)


def test_decodes_tokens_wait_for_the_first_one():
    machine, actions = machine_after([PLACED, STARTED, token(1), token(2), DECODED])
    assert "Deliver" not in kinds(actions) and not machine.ended
    deliver, finish = machine.handle(token(0), 9.0)[:2]
    assert [emitted.offset for emitted in deliver.tokens] == [0, 1, 2]
    assert finish == Finish(FinishReason.LENGTH)


def test_a_first_token_that_is_the_last_cancels_decode():
    machine, actions = machine_after([PLACED, STARTED, token(0), LegFinished(Role.PREFILL, FinishReason.STOP, PREFILL)])
    assert kinds(actions[3:]) == ["Release", "Finish", "Cancel", "Release", "Forget"]
    assert actions[5].worker == D
    assert machine.state is RequestState.FINISHED


def test_decode_may_hear_of_a_last_first_token_before_we_do():
    """Prefill tells decode directly; decode's word comes by another connection than prefill's."""
    overtaken = LegFinished(Role.DECODE, FinishReason.CANCELLED, decode=DECODE)
    stopped = LegFinished(Role.PREFILL, FinishReason.STOP, PREFILL)
    machine, actions = machine_after([PLACED, STARTED, overtaken, token(0), stopped])
    assert kinds(actions[2:]) == ["Release", "Deliver", "Release", "Finish", "Forget"]
    assert machine.state is RequestState.FINISHED
    machine, _ = machine_after([PLACED, STARTED, overtaken, PREFILL_FAILED])
    assert machine.state is RequestState.UNPLACED


def test_a_stop_string_cancels_decode_but_lets_a_finished_handoff_tell_its_timings():
    machine, _ = machine_after([PLACED, STARTED, token(0), token(1)])
    actions = machine.handle(StopMatched(), 9.0)
    assert kinds(actions) == ["Finish", "Cancel", "Release"]
    assert kinds(machine.handle(HANDED_OFF, 9.0)) == ["Release", "Forget"]
    machine, _ = machine_after([PLACED, STARTED, token(0)])
    assert kinds(machine.handle(StopMatched(), 9.0)) == ["Finish", "Cancel", "Release", "Cancel", "Release", "Forget"]


def test_a_worker_that_gives_more_than_was_asked_for_fills_no_memory_and_the_client_gets_its_own():
    machine, actions = machine_after([Placed(P, D), *(token(offset) for offset in (10**9, *range(20)))])
    delivered = [emitted.offset for action in actions if isinstance(action, Deliver) for emitted in action.tokens]
    assert delivered == list(range(8))
    assert not machine._ahead


# --- failures --------------------------------------------------------------------------------------------------------


def failing(*events, budget: Recovery | None = None, sampling: Sampling | None = None) -> tuple:
    """Events in a row, each attempt on the same pair; returns the machine and what the last event led to."""
    machine = RequestMachine("r-0", [1, 2, 3], sampling or Sampling(max_tokens=8, seed=1), 0, budget or Recovery())
    actions = []
    for event in events:
        if machine.state is RequestState.UNPLACED and not isinstance(event, Placed | NotPlaced):
            machine.handle(PLACED, 1.0)
        actions = machine.handle(event, 1.0)
    return machine, actions


def test_the_first_failure_decides_and_blames_whom_the_leg_blames():
    machine, actions = failing(PLACED, STARTED, token(0), DECODE_FAILED)
    over, release, cancel, *_, again = actions
    assert over == AttemptOver(FENCE, Interruption.TRANSFER_FAILED, DECODE_FAILED.error, Role.PREFILL, P)
    assert (release.worker, cancel.worker) == (D, P)
    assert again == PlaceAgain(0.0, avoid=frozenset({P}), keep=frozenset({D}))
    assert machine.state is RequestState.UNPLACED


@pytest.mark.parametrize("when", [[], [STARTED], [STARTED, token(0)], [STARTED, token(1)]], ids=len)
@pytest.mark.parametrize(
    ("event", "kind", "blamed", "cancelled"),
    [
        (PREFILL_LOST, Interruption.WORKER_LOST, P, {D}),
        (DECODE_LOST, Interruption.WORKER_LOST, D, {P}),
        (PREFILL_STALLED, Interruption.STALLED, P, {P, D}),
        (DECODE_STALLED, Interruption.STALLED, D, {P, D}),
        (DECODE_FAILED, Interruption.TRANSFER_FAILED, P, {P}),
        (PREFILL_FAILED, Interruption.TRANSFER_FAILED, D, {D}),
        (LegFailed(Role.DECODE, Role.DECODE, Draining("leaving")), Interruption.DRAINED, D, {P}),
        (LegFailed(Role.PREFILL, Role.PREFILL, StaleFence("restarted")), Interruption.PROTOCOL_ERROR, P, {D}),
        (LegFailed(Role.PREFILL, Role.DECODE, LayoutMismatch("differ")), Interruption.PROTOCOL_ERROR, D, {D}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_befalls_a_worker_the_request_goes_on_without_it(when, event, kind, blamed, cancelled):
    machine, actions = failing(PLACED, *when, event)
    over, *legs, again = actions
    assert (over.kind, over.worker) == (kind, blamed)
    assert {action.worker for action in legs if isinstance(action, Cancel)} == cancelled
    assert [type(action) for action in legs].count(Release) == 2
    assert (again.avoid, again.keep) == ({blamed}, {P, D} - {blamed}), "the other one has some of the KV"
    delivered = machine.delivered
    to_decode, _ = machine.handle(PLACED, 9.0)
    assert (to_decode.attempt.fence.attempt, to_decode.attempt.output) == (2, [100, 101][:delivered])


def test_a_leg_that_an_attempt_does_not_have_is_the_fault_of_the_one_that_did_its_part():
    blames_prefill = LegFailed(Role.DECODE, Role.PREFILL, TransferFailed("no"))
    _, (over, *_) = failing(Placed(None, D), STARTED, blames_prefill)
    assert over.worker == D


def test_prefills_death_after_the_takeover_harms_nobody():
    for taken_over in (DECODE_STARTED, token(1)):
        for gone in (PREFILL_LOST, PREFILL_STALLED, PREFILL_FAILED):
            machine, actions = failing(PLACED, STARTED, token(0), taken_over, gone)
            assert machine.state is RequestState.STREAMING
            assert [type(action) for action in actions if not isinstance(action, Cancel)] == [Release]
    machine, _ = failing(PLACED, STARTED, DECODE_STARTED, PREFILL_LOST)
    assert machine.state is RequestState.UNPLACED, "the first token died with it"


def test_what_another_attempt_can_not_mend_ends_the_request_at_once():
    machine, actions = failing(PLACED, STARTED, REFUSED)
    assert kinds(actions) == ["AttemptOver", "Release", "Fail", "Cancel", "Release", "Forget"]
    assert actions[2] == Fail(REFUSED.error, Role.PREFILL)
    assert machine.state is RequestState.FAILED


def test_a_leg_that_is_cancelled_unasked_is_an_error_and_so_are_legs_that_end_without_the_tokens():
    _, (over, *_) = failing(PLACED, LegFinished(Role.PREFILL, FinishReason.CANCELLED))
    assert isinstance(over.error, ProtocolError)
    machine, (over, *_) = failing(PLACED, STARTED, HANDED_OFF, DECODED)
    assert "token 0 never came" in over.error.message
    machine.handle(PLACED, 2.0)
    machine.handle(token(0), 3.0)
    assert machine.state is RequestState.STREAMING, "the reason of the attempt before does not count"


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        (Sampling(max_tokens=2, seed=1), FinishReason.LENGTH),
        (Sampling(max_tokens=8, seed=1, stop_token_ids=[101]), FinishReason.STOP),
    ],
    ids=["length", "stop"],
)
@pytest.mark.parametrize("event", [DECODE_LOST, DECODE_STALLED, DECODE_FAILED], ids=lambda event: type(event).__name__)
def test_a_worker_that_dies_between_its_last_token_and_its_last_word_has_done_its_work(event, sampling, reason):
    """Another attempt would give a token too many."""
    machine, actions = failing(PLACED, STARTED, token(0), token(1), event, sampling=sampling)
    assert Finish(reason) in actions and machine.state is RequestState.FINISHED
    assert "AttemptOver" not in kinds(actions)


# --- the next attempt ------------------------------------------------------------------------------------------------


def test_a_retracted_request_goes_on_after_the_tokens_that_the_client_has():
    way = [PLACED, STARTED, token(0), DECODE_STARTED, HANDED_OFF, token(1), RETRACTED]
    machine, actions = machine_after(way, Sampling(max_tokens=8, seed=1))
    assert actions[-3:] == [
        AttemptOver(FENCE, Interruption.RETRACTED, None, None, None),
        Release(Role.DECODE, D, FENCE, well=False),
        PlaceAgain(0.0, frozenset(), frozenset()),
    ]
    assert machine.state is RequestState.UNPLACED and not machine.ended
    other = WorkerKey("decode-1", 33)
    to_decode, to_prefill = machine.handle(Placed(P, other), 9.0)
    fence = Fence("r-0", 2, 11, 33)
    for dispatch in (to_decode, to_prefill):
        assert (dispatch.attempt.fence, dispatch.attempt.prompt) == (fence, [1, 2, 3])
        assert dispatch.attempt.output == [100, 101], "what the client has is computed, not sampled again"
    last = [token(2), LegFinished(Role.PREFILL, FinishReason.HANDED_OFF), token(3), DECODED]
    actions = [action for event in last for action in machine.handle(event, 10.0)]
    assert kinds(actions) == ["Deliver", "Release", "Deliver", "Release", "Finish", "Forget"]
    assert machine.timings.decode == DecodeTimings(0.2, 0.4, 6, 6), "of both attempts"
    assert (machine.timings.prefill, machine.timings.handoff) == (PREFILL, HANDOFF), "of the prompt's own"


def test_what_came_out_of_order_before_a_retraction_comes_again():
    """Token 0 is still on prefill's link when decode has given 1 and 2 and is retracted."""
    machine, actions = machine_after([PLACED, STARTED, token(1), token(2), RETRACTED])
    assert kinds(actions[2:]) == ["AttemptOver", "Release", "Cancel", "Release", "PlaceAgain"]
    (to_decode, _) = machine.handle(PLACED, 9.0)
    assert to_decode.attempt.output == []
    delivered = machine.handle(token(0), 10.0)
    assert [emitted.offset for emitted in delivered[0].tokens] == [0], "1 and 2 are the next attempt's to give"


def test_the_second_attempts_first_token_is_prefills_own():
    machine, _ = machine_after([PLACED, STARTED, token(0), token(1), RETRACTED, PLACED, STARTED, token(2)])
    machine.handle(PREFILL_LOST, 9.0)
    assert machine.state is RequestState.UNPLACED, "decode has not taken over: its KV died with prefill"
    machine, _ = machine_after([PLACED, STARTED, token(0), token(1), RETRACTED, PLACED, DECODE_STARTED, PREFILL_LOST])
    assert machine.state is RequestState.UNPLACED, "token 2 died with it, whatever the client has of the first attempt"


def test_a_first_attempt_without_a_place_fails_at_once():
    machine = RequestMachine("r-0", [1], Sampling(max_tokens=8, seed=1))
    assert kinds(machine.handle(NOT_PLACED, 9.0)) == ["Fail", "Forget"]
    assert machine.state is RequestState.FAILED


def test_priority_goes_with_every_attempt():
    machine = RequestMachine("r-0", [1], Sampling(max_tokens=8, seed=1), priority=7)
    first = machine.handle(PLACED, 1.0)
    machine.handle(RETRACTED, 2.0)
    assert [dispatch.attempt.priority for dispatch in (*first, *machine.handle(PLACED, 3.0))] == [7] * 4

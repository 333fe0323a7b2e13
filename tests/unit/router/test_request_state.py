"""The life of one choice: every state with every event, the races of two legs, and random orders of all of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import IllegalTransition, NoWorker, ProtocolError, TransferFailed, WorkerLost
from cluster.messages import (
    DecodeAttempt,
    DecodeTimings,
    Emitted,
    Fence,
    FinishReason,
    HandoffTimings,
    PrefillAttempt,
    PrefillTimings,
    Role,
    Sampling,
)
from router.request_state import (
    Cancel,
    ClientGone,
    DeadlinePassed,
    Deliver,
    Dispatch,
    Fail,
    Finish,
    Forget,
    LegFailed,
    LegFinished,
    LegLost,
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
    RequestState.FAILED: [PLACED, STARTED, DECODE_FAILED],
    RequestState.CANCELLED: [PLACED, GONE],
}
EVENTS = [
    PLACED, NOT_PLACED, STARTED, token(0), HANDED_OFF, PREFILL_FAILED, PREFILL_LOST, StopMatched(), GONE, DEADLINE,
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
    **{(state, "LegFailed"): RequestState.FAILED for state in ACTIVE},
    **{(state, "LegLost"): RequestState.FAILED for state in ACTIVE},
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
    assert (machine.prefill_timings, machine.handoff_timings, machine.decode_timings) == (PREFILL, HANDOFF, DECODE)


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
    assert machine.state is RequestState.FAILED


def test_a_stop_string_cancels_decode_but_lets_a_finished_handoff_tell_its_timings():
    machine, _ = machine_after([PLACED, STARTED, token(0), token(1)])
    actions = machine.handle(StopMatched(), 9.0)
    assert kinds(actions) == ["Finish", "Cancel", "Release"]
    assert kinds(machine.handle(HANDED_OFF, 9.0)) == ["Release", "Forget"]
    machine, _ = machine_after([PLACED, STARTED, token(0)])
    assert kinds(machine.handle(StopMatched(), 9.0)) == ["Finish", "Cancel", "Release", "Cancel", "Release", "Forget"]


# --- failures --------------------------------------------------------------------------------------------------------


def test_the_first_failure_decides_and_blames_whom_the_leg_blames():
    machine, _ = machine_after([PLACED, STARTED, token(0)])
    release, fail, cancel, *_ = machine.handle(DECODE_FAILED, 9.0)
    assert fail == Fail(DECODE_FAILED.error, Role.PREFILL)
    assert (release.worker, cancel.worker) == (D, P)
    assert machine.handle(PREFILL_FAILED, 9.1) == [], "the second failure is no news"


def test_prefills_death_after_the_takeover_harms_nobody():
    for taken_over in (DECODE_STARTED, token(1)):
        machine, _ = machine_after([PLACED, STARTED, token(0), taken_over, PREFILL_LOST])
        assert machine.state is RequestState.STREAMING
    machine, _ = machine_after([PLACED, STARTED, DECODE_STARTED, PREFILL_LOST])
    assert machine.state is RequestState.FAILED, "the first token died with it"


def test_a_leg_that_is_cancelled_unasked_is_an_error_and_so_are_legs_that_end_without_the_tokens():
    _, actions = machine_after([PLACED, LegFinished(Role.PREFILL, FinishReason.CANCELLED)])
    assert isinstance(actions[3].error, ProtocolError)
    machine, actions = machine_after([PLACED, STARTED, HANDED_OFF, DECODED])
    assert machine.state is RequestState.FAILED
    assert any(isinstance(action, Fail) and "token 0 never came" in action.error.message for action in actions)


def test_a_deadline_also_ends_the_wait_for_timings():
    machine, _ = machine_after([PLACED, STARTED, token(0), DECODE_STARTED, DECODED])
    assert kinds(machine.handle(DEADLINE, 60.0)) == ["Cancel", "Release", "Forget"]
    assert machine.handle(DEADLINE, 61.0) == []


# --- the next attempt ------------------------------------------------------------------------------------------------


def test_a_retracted_request_goes_on_after_the_tokens_that_the_client_has():
    way = [PLACED, STARTED, token(0), DECODE_STARTED, HANDED_OFF, token(1), RETRACTED]
    machine, actions = machine_after(way, Sampling(max_tokens=8, seed=1))
    assert actions[-2:] == [Release(Role.DECODE, D, FENCE), PlaceAgain(FENCE, FinishReason.RETRACTED)]
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
    assert machine.decode_timings == DecodeTimings(0.2, 0.4, 6, 6), "of both attempts"
    assert (machine.prefill_timings, machine.handoff_timings) == (PREFILL, HANDOFF), "of the prompt's own"


def test_what_came_out_of_order_before_a_retraction_comes_again():
    """Token 0 is still on prefill's link when decode has given 1 and 2 and is retracted."""
    machine, actions = machine_after([PLACED, STARTED, token(1), token(2), RETRACTED])
    assert kinds(actions[2:]) == ["Release", "Cancel", "Release", "PlaceAgain"]
    (to_decode, _) = machine.handle(PLACED, 9.0)
    assert to_decode.attempt.output == []
    delivered = machine.handle(token(0), 10.0)
    assert [emitted.offset for emitted in delivered[0].tokens] == [0], "1 and 2 are the next attempt's to give"


def test_the_second_attempts_first_token_is_prefills_own():
    machine, _ = machine_after([PLACED, STARTED, token(0), token(1), RETRACTED, PLACED, STARTED, token(2)])
    machine.handle(PREFILL_LOST, 9.0)
    assert machine.state is RequestState.FAILED, "decode has not taken over: its KV died with prefill"
    machine, _ = machine_after([PLACED, STARTED, token(0), token(1), RETRACTED, PLACED, DECODE_STARTED, PREFILL_LOST])
    assert machine.state is RequestState.FAILED, "token 2 died with it, whatever the client has of the first attempt"


def test_without_a_place_for_the_next_attempt_the_request_fails():
    machine, _ = machine_after([PLACED, STARTED, token(0), RETRACTED])
    assert kinds(machine.handle(NOT_PLACED, 9.0)) == ["Fail", "Forget"]
    assert machine.state is RequestState.FAILED


def test_priority_goes_with_every_attempt():
    machine = RequestMachine("r-0", [1], Sampling(max_tokens=8, seed=1), priority=7)
    first = machine.handle(PLACED, 1.0)
    machine.handle(RETRACTED, 2.0)
    assert [dispatch.attempt.priority for dispatch in (*first, *machine.handle(PLACED, 3.0))] == [7] * 4


# --- any order -------------------------------------------------------------------------------------------------------

RACES = st.lists(
    st.one_of(
        st.builds(token, st.integers(0, 5)),
        st.sampled_from(
            [
                STARTED,
                DECODE_STARTED,
                HANDED_OFF,
                DECODED,
                RETRACTED,
                PREFILL_FAILED,
                DECODE_FAILED,
                PREFILL_LOST,
                DECODE_LOST,
                StopMatched(),
                GONE,
                DEADLINE,
            ]
        ),
    ),
    max_size=24,
)


@settings(max_examples=500, deadline=None)
@given(RACES, st.sampled_from([PLACED, Placed(P, None), Placed(None, D)]))
def test_in_any_order_a_request_ends_once_and_tokens_come_in_order(events, placed):
    machine, actions = machine_after([placed, *events], again=placed)
    actions += machine.handle(DEADLINE, 98.0)
    actions += machine.handle(DEADLINE, 99.0)
    ends = [action for action in actions if isinstance(action, Finish | Fail)]
    assert len(ends) == (machine.state is not RequestState.CANCELLED)
    offsets = [emitted.offset for action in actions if isinstance(action, Deliver) for emitted in action.tokens]
    assert offsets == list(range(len(offsets)))
    dispatched = [(action.role, action.worker) for action in actions if isinstance(action, Dispatch)]
    released = [(action.role, action.worker) for action in actions if isinstance(action, Release)]
    assert sorted(released) == sorted(dispatched), "each leg gives back what it took, once"
    assert kinds(actions).count("Forget") == 1 and isinstance(actions[-1], Forget)
    after_end = actions[actions.index(ends[0]) :] if ends else []
    assert not any(isinstance(action, Deliver) for action in after_end)
    cancelled = [(action.role, action.message.fence) for action in actions if isinstance(action, Cancel)]
    assert len(cancelled) == len(set(cancelled))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_two_links_may_interleave_in_any_way(data):
    """Within a link the order holds; between the links anything goes: the client gets all tokens and one end."""
    links = [[STARTED, token(0), HANDED_OFF], [DECODE_STARTED, token(1), token(2), token(3), DECODED]]
    order = []
    while any(links):
        link = data.draw(st.sampled_from([link for link in links if link]))
        order.append(link.pop(0))
    machine, actions = machine_after([PLACED, *order])
    assert machine.state is RequestState.FINISHED and machine.delivered == 4
    assert kinds(actions)[-1] == "Forget"
    assert not any(isinstance(action, Cancel) for action in actions)

"""Random orders of all that a choice can hear: two links that interleave, and faults of any leg at any time."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import Recovery
from cluster.errors import (
    TransferFailed,
    WorkerLost,
    WorkerStalled,
)
from cluster.messages import (
    Emitted,
    FinishReason,
    PrefillAttempt,
    Role,
    Sampling,
)
from router.request_state import (
    Cancel,
    Deliver,
    Dispatch,
    Fail,
    Finish,
    Forget,
    LegFailed,
    LegFinished,
    LegLost,
    LegStalled,
    LegStarted,
    PlaceAgain,
    Placed,
    Release,
    RequestMachine,
    RequestState,
    StopMatched,
    TokensArrived,
    WorkerKey,
)
from tests.unit.router.test_request_state import (
    DEADLINE,
    DECODE_FAILED,
    DECODE_LOST,
    DECODE_STALLED,
    DECODE_STARTED,
    DECODED,
    GONE,
    HANDED_OFF,
    NOT_PLACED,
    PLACED,
    PREFILL_FAILED,
    PREFILL_LOST,
    PREFILL_STALLED,
    REFUSED,
    RETRACTED,
    STARTED,
    D,
    P,
    kinds,
    machine_after,
    token,
)

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
                PREFILL_STALLED,
                DECODE_STALLED,
                REFUSED,
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


# --- any faults ------------------------------------------------------------------------------------------------------

LENGTH = 6


class Leg:
    """A worker at one attempt, as far as its words go."""

    def __init__(self, attempt) -> None:
        given, fence = len(attempt.output), attempt.fence
        prefill = isinstance(attempt, PrefillAttempt)
        self.role = Role.PREFILL if prefill else Role.DECODE
        assert attempt.output == [100 + offset for offset in range(given)], "what came before is handed on whole"
        alone = (attempt.decode if prefill else attempt.prefill) is None
        first = given if prefill or alone else given + 1
        last = given + 1 if prefill else LENGTH
        reason = FinishReason.HANDED_OFF if prefill and not alone else FinishReason.LENGTH
        tokens = [TokensArrived([Emitted(fence, offset, 100 + offset)]) for offset in range(first, last)]
        self.words = [LegStarted(self.role), *tokens, LegFinished(self.role, reason)]


class World:
    """A router's shell around one machine: words reach it while their fence is the current one."""

    def __init__(self, placements) -> None:
        budget = Recovery(max_attempts=1000, max_attempts_without_progress=1000)
        self.machine = RequestMachine("r-0", [1, 2], Sampling(max_tokens=LENGTH, seed=1), 0, budget)
        self.placements = placements
        self.answer: list[int] = []
        self.ends: list[object] = []
        self.legs: dict[Role, Leg] = {}
        self.owned: list[tuple[Role, WorkerKey]] = []
        self.forgotten = 0
        self.feed(self.placements())

    def feed(self, event) -> None:
        for action in self.machine.handle(event, 1.0):
            if isinstance(action, Dispatch):
                self.legs[action.role] = Leg(action.attempt)
                self.owned.append((action.role, action.worker))
            elif isinstance(action, Release):
                self.owned.remove((action.role, action.worker))
                self.legs.pop(action.role)
            elif isinstance(action, Deliver):
                self.answer += [emitted.token for emitted in action.tokens]
            elif isinstance(action, Finish | Fail):
                self.ends.append(action)
            elif isinstance(action, PlaceAgain):
                self.feed(self.placements(action))
            self.forgotten += isinstance(action, Forget)

    def speak(self, role: Role) -> None:
        leg = self.legs[role]
        self.feed(leg.words.pop(0))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_whatever_fails_the_client_gets_each_token_once_in_order_and_one_end(data):
    """Two links in any order, and at any time any fault of any leg: lost, stalled, failed, retracted, nowhere to go."""
    number = iter(range(1, 10_000))
    misses = data.draw(st.integers(0, 6))

    def placements(again: PlaceAgain | None = None):
        turn = next(number)
        if again is not None and turn <= misses:
            return NOT_PLACED
        prefill, decode = WorkerKey(f"prefill-{turn}", turn), WorkerKey(f"decode-{turn}", turn)
        if world is not None and world.machine.delivered == LENGTH - 1:
            return Placed(prefill, None)
        return data.draw(st.sampled_from([Placed(prefill, decode), Placed(prefill, decode), Placed(None, decode)]))

    world: World | None = None
    world = World(placements)
    faults = data.draw(st.integers(0, 12))
    while world.legs:
        role = data.draw(st.sampled_from(sorted(world.legs)))
        other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
        kind = data.draw(st.integers(0, 11)) if faults else 11
        if kind < 5:
            faults -= 1
            world.feed(
                [
                    LegLost(role, WorkerLost("gone")),
                    LegStalled(role, WorkerStalled("silent")),
                    LegFailed(role, role, TransferFailed("mine")),
                    LegFailed(role, other, TransferFailed("yours")),
                    LegFinished(Role.DECODE, FinishReason.RETRACTED),
                ][kind]
            )
        elif world.legs[role].words:
            world.speak(role)
    assert world.answer == [100 + offset for offset in range(LENGTH)]
    assert world.ends == [Finish(FinishReason.LENGTH)]
    assert world.owned == [] and world.forgotten == 1

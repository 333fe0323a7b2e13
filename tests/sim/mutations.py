"""Bugs to plant: each takes one promise back, in the real code. The simulation has to notice every one of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple
from unittest import mock

import msgspec

from bootstrap.roster_state import MemberMachine
from cluster.errors import Cancelled
from cluster.messages import Ack, CancelAttempt, Fence, Message
from decode_worker.decode_loop import DecodeLoop
from engine.engine import Engine
from kv_transfer import driver
from kv_transfer.peers import Peers
from kv_transfer.receiver import HandoffReceiver
from kv_transfer.receiver_state import Accept, EndLease, ReceiverLease, ReceiverState, Send, WriterFenced
from kv_transfer.sender_state import SenderHandoff
from prefill_worker.prefill_loop import PrefillLoop
from router.request_state import Dispatch, RequestMachine
from tests.sim.faults import Fault
from tests.sim.router import SimFleet

Plant = Callable[[], AbstractContextManager[object]]


class Mutation(NamedTuple):
    """`plant` gives a context in which the bug is there. `faults` are those that bring it out."""

    plant: Plant
    faults: tuple[Fault, ...]


def _replaced(owner: Any, **methods: Any) -> Plant:
    return lambda: mock.patch.multiple(owner, **methods)


def _say_nothing(machine: Any, event: Any, now: float) -> list[Any]:
    """A transition that does nothing."""
    return []


# --- pages -----------------------------------------------------------------------------------------------------------


def _release_on_a_timer(receiver: HandoffReceiver, now: float) -> None:
    for lease in list(receiver._leases.values()):
        if lease.machine.state is ReceiverState.QUARANTINED:
            receiver._handle(lease, WriterFenced())


def _release_at_abort(lease: ReceiverLease, error: Any, blame: Any, now: float) -> Any:
    """In place of `_quarantine`: the pages come back when ABORT is sent, not when ABORTED has come."""
    lease.to(ReceiverState.ENDED)
    return lease._abort(error, blame)


def _ending_at_once(method: str) -> Any:
    """A transition that ends the lease on top of what it does."""
    original = getattr(ReceiverLease, method)

    def ended(lease: ReceiverLease, event: Any, now: float) -> Any:
        return [*original(lease, event, now), EndLease()]

    return ended


def _accept_damaged(lease: ReceiverLease, found: Any, expected: Any) -> Any:
    assert lease._done is not None
    lease.answer = Ack(lease.fence)
    lease.to(ReceiverState.ENDED)
    return [Send(lease.answer), Accept(lease._done.first_token, 0.0)]


def _end_with_writes_under_way(handoff: SenderHandoff) -> Any:
    handoff._in_flight, under_way = 0, handoff._in_flight
    try:
        return _END_IF_STILL(handoff)
    finally:
        handoff._in_flight = under_way


_END_IF_STILL = SenderHandoff._end_if_still


_SETTLING = driver._Settling

# --- fences ----------------------------------------------------------------------------------------------------------


def _without_fences() -> AbstractContextManager[object]:
    """A fence is its request's name: neither attempts nor lives of workers are told apart."""
    stack = ExitStack()
    for method, stand_in in (
        ("__eq__", lambda fence, other: isinstance(other, Fence) and fence.request == other.request),
        ("__hash__", lambda fence: hash(fence.request)),
    ):
        stack.callback(setattr, Fence, method, getattr(Fence, method))
        setattr(Fence, method, stand_in)
    stack.enter_context(mock.patch.object(Peers, "accepts", return_value=True))
    for loop in (PrefillLoop, DecodeLoop):
        stack.enter_context(mock.patch.object(loop, "_require_our_life"))
    return stack


# --- tokens ----------------------------------------------------------------------------------------------------------


def _take_tokens_as_they_come(machine: RequestMachine, event: Any, now: float) -> Any:
    """Whatever comes is the next token, whichever it is by its own word."""
    counted = enumerate(event.tokens, machine.delivered)
    tokens = [msgspec.structs.replace(emitted, offset=offset) for offset, emitted in counted]
    return _TOKENS(machine, msgspec.structs.replace(event, tokens=tokens), now)


_TOKENS = RequestMachine._tokens


def _begin_anew(machine: RequestMachine, event: Any, now: float) -> Any:
    """The next attempt is not told what the client has."""
    return [
        msgspec.structs.replace(action, attempt=msgspec.structs.replace(action.attempt, output=[]))
        if isinstance(action, Dispatch)
        else action
        for action in _PLACED(machine, event, now)
    ]


_PLACED = RequestMachine._placed


def _without_cancels(fleet: SimFleet, key: Any, message: Message) -> None:
    if not isinstance(message, CancelAttempt):
        _POST(fleet, key, message)


_POST = SimFleet.post

# --- all of them -----------------------------------------------------------------------------------------------------

MUTATIONS = {
    "quarantined pages come back on a timer": Mutation(
        _replaced(HandoffReceiver, _look_for_dead_writers=_release_on_a_timer),
        (Fault.WRITE_SLOW, Fault.PEER_LINK_BROKEN, Fault.PREFILL_STOPPED),
    ),
    "pages come back at ABORT instead of ABORTED": Mutation(
        _replaced(
            ReceiverLease,
            _quarantine=_release_at_abort,
            _cancel=_ending_at_once("_cancel"),
            _lost=_ending_at_once("_lost"),
        ),
        (Fault.CLIENT_LEAVES, Fault.DECODE_LINK_BROKEN, Fault.PEER_LINK_BROKEN),
    ),
    "what the kernel still holds is not waited for": Mutation(
        _replaced(driver, _Settling=lambda until: _SETTLING(0.0, turns=0)),
        (Fault.WRITE_FAILED, Fault.PREFILL_ENGINE_KILLED),
    ),
    "digests are not compared": Mutation(_replaced(ReceiverLease, _damaged=_accept_damaged), (Fault.WRITE_DAMAGED,)),
    "source pages are released while they are written from": Mutation(
        _replaced(SenderHandoff, _end_if_still=_end_with_writes_under_way),
        (Fault.CLIENT_LEAVES, Fault.PEER_LINK_BROKEN),
    ),
    "pages are free while a step under way writes to them": Mutation(
        _replaced(Engine, release=Engine._give_back), (Fault.CLIENT_LEAVES,)
    ),
    "fences are not checked, neither attempt nor epochs": Mutation(
        _without_fences, (Fault.WRITE_SLOW, Fault.PREFILL_STOPPED, Fault.DECODE_ENGINE_KILLED)
    ),
    "a lost ACK is never asked for again": Mutation(
        _replaced(
            SenderHandoff,
            _repeat_done=_say_nothing,
            _done_again=_say_nothing,
        ),
        (Fault.MESSAGES_LOST,),
    ),
    "tokens go to the client as they come": Mutation(
        _replaced(RequestMachine, _tokens=_take_tokens_as_they_come), (Fault.MESSAGES_REPEATED,)
    ),
    "the next attempt is not told what the client has": Mutation(
        _replaced(RequestMachine, _placed=_begin_anew), (Fault.DECODE_KILLED, Fault.DECODE_ENGINE_KILLED)
    ),
    "workers are not told that an attempt is given up": Mutation(
        _replaced(SimFleet, post=_without_cancels), (Fault.CLIENT_LEAVES, Fault.PREFILL_KILLED)
    ),
    "who was silent for longer than a lease never comes back": Mutation(
        _replaced(MemberMachine, _come_back=_say_nothing), (Fault.PREFILL_STOPPED, Fault.DECODE_STOPPED)
    ),
    "a leg that lost its router ends the whole request": Mutation(
        _replaced(Cancelled, retryable=False), (Fault.DECODE_LINK_BROKEN, Fault.PREFILL_LINK_BROKEN)
    ),
}

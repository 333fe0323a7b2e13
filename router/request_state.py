"""One choice of a request, from its placement to its one end. Pure: time is an argument.

    UNPLACED --Placed--> PLACED --LegStarted--> PREFILLING --token 0--> STREAMING --last token, reason--> FINISHED

    PLACED, PREFILLING, STREAMING --LegFailed, LegLost, DeadlinePassed--> FAILED
    PLACED, PREFILLING, STREAMING --ClientGone--> CANCELLED
    PLACED, PREFILLING, STREAMING --LegFinished (retracted)--> UNPLACED --Placed--> PLACED ...

Two legs can run for a choice: prefill computes the prompt and gives token 0, decode gives the rest. A unified decode
worker is a decode leg alone, a one-token request a prefill leg alone. Their words reach the router over two links, so
in no common order: tokens go into a ledger by offset and out of it in order, without gap or repetition; FINISHED needs
the decode leg's reason and every token before it.

The first failure decides: it ends the choice at once and cancels the other leg. Only a prefill leg that fails after the
decode leg has taken over harms nobody. FINISHED may still wait for the prefill leg's last word, which has the timings.

A request can go on as another attempt: it gives up both legs, forgets what came out of order, and asks for another
placement; `Placed` then makes the next fence, with the ledger's tokens as `output`. The next attempt computes them
again, as far as nobody has them cached, and continues with the very tokens that would have come: a position's
randomness is its own. There is this one path (`_place_again`); retraction takes it.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar, Union

import msgspec

from cluster.errors import BatonError, DeadlineExceeded, ProtocolError
from cluster.messages import (
    CancelAttempt,
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
from cluster.state_machine import StateMachine


class RequestState(Enum):
    UNPLACED = "unplaced"
    PLACED = "placed"
    PREFILLING = "prefilling"
    STREAMING = "streaming"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class WorkerKey(msgspec.Struct, frozen=True):
    """One life of one worker."""

    worker: str
    epoch: int

    def __str__(self) -> str:
        return self.worker


# --- events ----------------------------------------------------------------------------------------------------------


class Placed(msgspec.Struct, frozen=True):
    """The policy has chosen; at least one of the two is set."""

    prefill: WorkerKey | None
    decode: WorkerKey | None


class NotPlaced(msgspec.Struct, frozen=True):
    """There is no place for the next attempt."""

    error: BatonError


class LegStarted(msgspec.Struct, frozen=True):
    role: Role


class TokensArrived(msgspec.Struct, frozen=True):
    tokens: list[Emitted]


class LegFinished(msgspec.Struct, frozen=True):
    role: Role
    reason: FinishReason
    prefill: PrefillTimings | None = None
    handoff: HandoffTimings | None = None
    decode: DecodeTimings | None = None


class LegFailed(msgspec.Struct, frozen=True):
    """A worker's word that its leg is over. `blame` is the leg whose fault it was, not always the one that tells."""

    role: Role
    blame: Role
    error: BatonError


class LegLost(msgspec.Struct, frozen=True):
    """The worker, or the link to it, is gone. No word of this leg will come any more."""

    role: Role
    error: BatonError


class StopMatched(msgspec.Struct, frozen=True):
    """The text has reached one of the request's stop strings."""


class ClientGone(msgspec.Struct, frozen=True):
    """Nobody reads this choice any more."""

    reason: str


class DeadlinePassed(msgspec.Struct, frozen=True):
    seconds: float
    """How long the request was allowed to take."""


# --- actions ---------------------------------------------------------------------------------------------------------


class Dispatch(msgspec.Struct, frozen=True):
    """Send a leg to its worker, which it occupies until `Release`."""

    role: Role
    worker: WorkerKey
    attempt: PrefillAttempt | DecodeAttempt


class Cancel(msgspec.Struct, frozen=True):
    """Tell the worker to give the leg up. No word back is needed."""

    role: Role
    worker: WorkerKey
    message: CancelAttempt


class Release(msgspec.Struct, frozen=True):
    """The leg is over and occupies its worker no more; exactly one for each `Dispatch`."""

    role: Role
    worker: WorkerKey
    fence: Fence


class Deliver(msgspec.Struct, frozen=True):
    """The next tokens for the client, in order."""

    tokens: list[Emitted]


class Finish(msgspec.Struct, frozen=True):
    reason: FinishReason


class Fail(msgspec.Struct, frozen=True):
    error: BatonError
    blame: Role | None


class PlaceAgain(msgspec.Struct, frozen=True):
    """Choose workers for the next attempt, and tell by `Placed` or `NotPlaced`. Nothing with this fence is expected any
    more."""

    fence: Fence
    reason: FinishReason


class Forget(msgspec.Struct, frozen=True):
    """The choice has ended and both legs are over: nothing with this fence is expected any more."""

    fence: Fence | None


Action = Union[Dispatch, Cancel, Release, Deliver, Finish, Fail, PlaceAgain, Forget]

_ACTIVE = (RequestState.PLACED, RequestState.PREFILLING, RequestState.STREAMING)
_ENDED = (RequestState.FINISHED, RequestState.FAILED, RequestState.CANCELLED)


class RequestMachine(StateMachine[Action]):
    """The life of one choice. `request` is its unique id, `prompt` its token ids."""

    TABLE: ClassVar = {
        (RequestState.UNPLACED, Placed): "_placed",
        (RequestState.UNPLACED, NotPlaced): "_not_placed",
        (RequestState.UNPLACED, StopMatched): "_stop",
        (RequestState.UNPLACED, ClientGone): "_client_gone",
        (RequestState.UNPLACED, DeadlinePassed): "_deadline",
        **{(state, LegStarted): "_started" for state in _ACTIVE},
        **{(state, TokensArrived): "_tokens" for state in _ACTIVE},
        **{(state, LegFinished): "_finished" for state in _ACTIVE},
        **{(state, LegFailed): "_failed" for state in _ACTIVE},
        **{(state, LegLost): "_lost" for state in _ACTIVE},
        **{(state, StopMatched): "_stop" for state in _ACTIVE},
        **{(state, ClientGone): "_client_gone" for state in _ACTIVE},
        **{(state, DeadlinePassed): "_deadline" for state in _ACTIVE},
        # Ended: legs' last words complete the record; the rest crossed our own on the way.
        **{(state, LegStarted): "_ignore" for state in _ENDED},
        **{(state, TokensArrived): "_ignore" for state in _ENDED},
        **{(state, LegFinished): "_late_word" for state in _ENDED},
        **{(state, LegFailed): "_late_word" for state in _ENDED},
        **{(state, LegLost): "_late_word" for state in _ENDED},
        **{(state, StopMatched): "_ignore" for state in _ENDED},
        **{(state, ClientGone): "_ignore" for state in _ENDED},
        **{(state, DeadlinePassed): "_give_up_waiting" for state in _ENDED},
    }

    def __init__(self, request: str, prompt: list[int], sampling: Sampling, priority: int = 0) -> None:
        super().__init__(request, RequestState.UNPLACED)
        self.fence: Fence | None = None
        self.prefill_timings: PrefillTimings | None = None
        self.handoff_timings: HandoffTimings | None = None
        self.decode_timings: DecodeTimings | None = None
        self._prompt = prompt
        self._sampling = sampling
        self._priority = priority
        self._attempt = 0
        self._output: list[int] = []
        """Tokens that went to the client: the ledger is complete up to here."""
        self._resumed_at = 0
        """How many of them earlier attempts gave."""
        self._open: dict[Role, WorkerKey] = {}
        self._ahead: dict[int, Emitted] = {}
        """Tokens that came before one of a smaller offset."""
        self._reason: FinishReason | None = None
        """Known, but tokens before it are still missing."""
        self._taken_over = False

    @property
    def ended(self) -> bool:
        return self.state in _ENDED

    @property
    def delivered(self) -> int:
        """Tokens that went to the client."""
        return len(self._output)

    # --- the beginning -----------------------------------------------------------------------------------------------

    def _placed(self, event: Placed, now: float) -> list[Action]:
        self._attempt += 1
        prefill, decode = event.prefill, event.decode
        fence = self.fence = Fence(
            self.name, self._attempt, prefill.epoch if prefill else 0, decode.epoch if decode else 0
        )
        self._resumed_at, self._taken_over = self.delivered, False
        output = list(self._output)
        actions: list[Action] = []
        # Decode first: it only makes a reservation, and then knows the fence before prefill's OFFER can come.
        if decode is not None:
            peer = prefill.worker if prefill else None
            to_decode = DecodeAttempt(fence, self._prompt, self._sampling, peer, output, self._priority)
            actions.append(Dispatch(Role.DECODE, decode, to_decode))
            self._open[Role.DECODE] = decode
        if prefill is not None:
            peer = decode.worker if decode else None
            to_prefill = PrefillAttempt(fence, self._prompt, self._sampling, peer, output, self._priority)
            actions.append(Dispatch(Role.PREFILL, prefill, to_prefill))
            self._open[Role.PREFILL] = prefill
        self.to(RequestState.PLACED)
        return actions

    def _not_placed(self, event: NotPlaced, now: float) -> list[Action]:
        return self._fail(event.error, None)

    def _place_again(self, reason: FinishReason) -> list[Action]:
        """The next attempt goes on after the last token that the client got. What came out of order comes again."""
        self._ahead.clear()
        self.to(RequestState.UNPLACED)
        return [*self._cancel_all("it goes on as another attempt"), PlaceAgain(self._live_fence(), reason)]

    def _started(self, event: LegStarted, now: float) -> list[Action]:
        self._taken_over |= event.role is Role.DECODE
        if self.state is RequestState.PLACED:
            self.to(RequestState.PREFILLING)
        return []

    # --- tokens ------------------------------------------------------------------------------------------------------

    def _tokens(self, event: TokensArrived, now: float) -> list[Action]:
        for emitted in event.tokens:
            if emitted.offset >= self.delivered:
                self._ahead.setdefault(emitted.offset, emitted)
            # Only a decode leg gives an attempt's second token, and it gives it after it has taken over the KV.
            self._taken_over |= emitted.offset > self._resumed_at
        tokens: list[Emitted] = []
        while self.delivered in self._ahead:
            emitted = self._ahead.pop(self.delivered)
            tokens.append(emitted)
            self._output.append(emitted.token)
        if not tokens:
            return []
        self.to(RequestState.STREAMING)
        return [Deliver(tokens), *self._finish_if_complete()]

    def _finished(self, event: LegFinished, now: float) -> list[Action]:
        if event.role not in self._open:
            return []
        actions = self._close_leg(event)
        if event.reason is FinishReason.CANCELLED:
            if event.role is Role.DECODE and Role.PREFILL in self._open:
                # A first token that is the last: prefill has told decode, whose word overtook prefill's own.
                return actions
            return [
                *actions,
                *self._fail(ProtocolError(f"{event.role.value} cancelled {self.name} unasked"), event.role),
            ]
        if event.reason is FinishReason.RETRACTED:
            return [*actions, *self._place_again(event.reason)]
        if event.reason is FinishReason.HANDED_OFF:
            self._taken_over = True
        else:
            self._reason = event.reason
            actions += self._finish_if_complete()
        if not self.ended and not self._open:
            error = ProtocolError(f"both legs of {self.name} have ended, but token {self.delivered} never came")
            actions += self._fail(error, event.role)
        return actions

    def _finish_if_complete(self) -> list[Action]:
        if self._reason is None or self._ahead or not self._has_begun:
            return []
        return self._finish(self._reason)

    def _stop(self, event: StopMatched, now: float) -> list[Action]:
        return self._finish(FinishReason.STOP)

    def _finish(self, reason: FinishReason) -> list[Action]:
        self.to(RequestState.FINISHED)
        actions: list[Action] = [Finish(reason), *self._cancel(Role.DECODE, "finished")]
        # After the takeover the prefill leg is about to end by itself, and its word has the timings.
        if not self._taken_over:
            actions += self._cancel(Role.PREFILL, "finished")
        return [*actions, *self._forget_if_over()]

    # --- other ends --------------------------------------------------------------------------------------------------

    def _failed(self, event: LegFailed, now: float) -> list[Action]:
        return self._leg_gone(event, event.error, event.blame)

    def _lost(self, event: LegLost, now: float) -> list[Action]:
        return self._leg_gone(event, event.error, event.role)

    def _leg_gone(self, event: LegFailed | LegLost, error: BatonError, blame: Role) -> list[Action]:
        if event.role not in self._open:
            return []
        actions = self._close_leg(event)
        needless = event.role is Role.PREFILL and self._taken_over and self._has_begun
        return actions if needless else [*actions, *self._fail(error, blame)]

    def _client_gone(self, event: ClientGone, now: float) -> list[Action]:
        self.to(RequestState.CANCELLED)
        return [*self._cancel_all(event.reason), *self._forget_if_over()]

    def _deadline(self, event: DeadlinePassed, now: float) -> list[Action]:
        error = DeadlineExceeded(f"the request was not done within {event.seconds:g} s ({self.delivered} tokens sent)")
        return self._fail(error, None)

    def _fail(self, error: BatonError, blame: Role | None) -> list[Action]:
        self.to(RequestState.FAILED)
        return [Fail(error, blame), *self._cancel_all(error.message), *self._forget_if_over()]

    # --- after the end -----------------------------------------------------------------------------------------------

    def _late_word(self, event: LegFinished | LegFailed | LegLost, now: float) -> list[Action]:
        if event.role not in self._open:
            return []
        return [*self._close_leg(event), *self._forget_if_over()]

    def _give_up_waiting(self, event: DeadlinePassed, now: float) -> list[Action]:
        if not self._open:
            return []
        return [*self._cancel_all("no last word"), *self._forget_if_over()]

    def _ignore(self, event: object, now: float) -> list[Action]:
        return []

    # --- legs --------------------------------------------------------------------------------------------------------

    @property
    def _has_begun(self) -> bool:
        """Whether this attempt's first token went out."""
        return self.delivered > self._resumed_at

    def _close_leg(self, event: LegFinished | LegFailed | LegLost) -> list[Action]:
        if isinstance(event, LegFinished):
            # The prompt's own prefill and handoff are the first attempt's; decoding is the work of all of them.
            unified = event.decode.prefill if event.decode else None
            self.prefill_timings = self.prefill_timings or event.prefill or unified
            self.handoff_timings = self.handoff_timings or event.handoff
            self.decode_timings = _together(self.decode_timings, event.decode)
        worker = self._open.pop(event.role, None)
        return [] if worker is None else [Release(event.role, worker, self._live_fence())]

    def _cancel(self, role: Role, reason: str) -> list[Action]:
        worker = self._open.pop(role, None)
        if worker is None:
            return []
        fence = self._live_fence()
        return [Cancel(role, worker, CancelAttempt(fence, reason)), Release(role, worker, fence)]

    def _cancel_all(self, reason: str) -> list[Action]:
        return [*self._cancel(Role.PREFILL, reason), *self._cancel(Role.DECODE, reason)]

    def _forget_if_over(self) -> list[Action]:
        return [] if self._open else [Forget(self.fence)]

    def _live_fence(self) -> Fence:
        assert self.fence is not None, "a leg is open only after Placed"
        return self.fence


def _together(before: DecodeTimings | None, after: DecodeTimings | None) -> DecodeTimings | None:
    """Of two attempts at one request."""
    if before is None or after is None:
        return before or after
    return DecodeTimings(
        await_seconds=before.await_seconds + after.await_seconds,
        decode_seconds=before.decode_seconds + after.decode_seconds,
        steps=before.steps + after.steps,
        batch_sum=before.batch_sum + after.batch_sum,
        prefill=before.prefill,
        batch_max=max(before.batch_max, after.batch_max),
        lease_seconds=before.lease_seconds + after.lease_seconds,
        verify_seconds=before.verify_seconds + after.verify_seconds,
        first_step_seconds=before.first_step_seconds,
    )

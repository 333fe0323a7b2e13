"""One choice of a request, from its placement to its one end. Pure: time is an argument.

    UNPLACED --Placed--> PLACED --LegStarted--> PREFILLING --token 0--> STREAMING --last token, reason--> FINISHED

    PLACED, PREFILLING, STREAMING --LegFailed, LegLost, LegStalled, LegFinished (retracted)--> UNPLACED
    UNPLACED --NotPlaced--> UNPLACED, but FAILED where there was no attempt yet
    UNPLACED, PLACED, PREFILLING, STREAMING --DeadlinePassed, no attempt left--> FAILED
    UNPLACED, PLACED, PREFILLING, STREAMING --ClientGone--> CANCELLED

Two legs can run for a choice: prefill computes the prompt and gives token 0, decode gives the rest. A unified decode
worker is a decode leg alone, a one-token request a prefill leg alone. Their words reach the router over two links, so
in no common order: tokens go into a ledger by offset and out of it in order, without gap or repetition; FINISHED needs
the decode leg's reason and every token before it.

The first failure decides: it ends the attempt at once, on both legs, and blames one of them. Only a prefill leg that
fails after the decode leg has taken over harms nobody. FINISHED may still wait for the prefill leg's last word, which
has the timings.

Then the choice goes on as another attempt: it gives up both legs, forgets what came out of order, and asks for another
placement, at once or a little later (`router.recovery`); `Placed` then makes the next fence, with the ledger's tokens
as `output`. The next attempt computes them again, as far as nobody has them cached, and continues with the very tokens
that would have come: a position's randomness is its own. There is this one path (`_interrupted`), whether a worker
died, stalled, failed, drained or retracted. An attempt that had given its last token, but not yet said so, is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import ClassVar, Union

import msgspec

from cluster.config import Recovery
from cluster.errors import BatonError, DeadlineExceeded, ProtocolError
from cluster.messages import (
    CancelAttempt,
    DecodeAttempt,
    Emitted,
    Fence,
    FinishReason,
    PrefillAttempt,
    Role,
    Sampling,
)
from cluster.state_machine import StateMachine
from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings
from router.recovery import DEFAULT_RECOVERY, Interruption, RetryBudget, innocent, interruption, natural_end
from router.timings import LegTimings


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
    """There is no place for the next attempt now."""

    error: BatonError
    expected: bool = False
    """There was one a moment ago, and workers may be on their way back."""


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


class LegStalled(msgspec.Struct, frozen=True):
    """The worker does not get on with the leg. Its connection stands: if it wakes up, it hears the cancel, and what it
    says of the leg until then is too late."""

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
    well: bool
    """It did what it was there for. False does not mean that it failed."""


class Deliver(msgspec.Struct, frozen=True):
    """The next tokens for the client, in order."""

    tokens: list[Emitted]


class Finish(msgspec.Struct, frozen=True):
    reason: FinishReason


class Fail(msgspec.Struct, frozen=True):
    error: BatonError
    blame: Role | None


class AttemptOver(msgspec.Struct, frozen=True):
    """The attempt was interrupted: nothing with this fence is expected any more. Comes before its legs' `Release`."""

    fence: Fence
    kind: Interruption
    error: BatonError | None
    """None: nobody's fault."""
    blame: Role | None
    worker: WorkerKey | None
    """The one that is to blame."""


class PlaceAgain(msgspec.Struct, frozen=True):
    """Choose workers for the next attempt, after so many seconds, and tell by `Placed` or `NotPlaced`. While the choice
    waits, it may end: then `Forget` comes."""

    after_seconds: float
    avoid: frozenset[WorkerKey]
    """They were to blame, since this choice last got on."""
    keep: frozenset[WorkerKey]
    """They have KV of it."""


class Forget(msgspec.Struct, frozen=True):
    """The choice has ended and both legs are over: nothing with this fence is expected any more."""

    fence: Fence | None


Action = Union[Dispatch, Cancel, Release, Deliver, Finish, Fail, AttemptOver, PlaceAgain, Forget]

_ACTIVE = (RequestState.PLACED, RequestState.PREFILLING, RequestState.STREAMING)
_ENDED = (RequestState.FINISHED, RequestState.FAILED, RequestState.CANCELLED)
_WELL = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.HANDED_OFF)


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
        **{(state, LegFailed): "_leg_gone" for state in _ACTIVE},
        **{(state, LegLost): "_leg_gone" for state in _ACTIVE},
        **{(state, LegStalled): "_leg_gone" for state in _ACTIVE},
        **{(state, StopMatched): "_stop" for state in _ACTIVE},
        **{(state, ClientGone): "_client_gone" for state in _ACTIVE},
        **{(state, DeadlinePassed): "_deadline" for state in _ACTIVE},
        # Ended: legs' last words complete the record; the rest crossed our own on the way.
        **{(state, LegStarted): "_ignore" for state in _ENDED},
        **{(state, TokensArrived): "_ignore" for state in _ENDED},
        **{(state, LegFinished): "_late_word" for state in _ENDED},
        **{(state, LegFailed): "_late_word" for state in _ENDED},
        **{(state, LegLost): "_late_word" for state in _ENDED},
        **{(state, LegStalled): "_give_up_waiting" for state in _ENDED},
        **{(state, StopMatched): "_ignore" for state in _ENDED},
        **{(state, ClientGone): "_ignore" for state in _ENDED},
        **{(state, DeadlinePassed): "_give_up_waiting" for state in _ENDED},
    }

    def __init__(
        self,
        request: str,
        prompt: list[int],
        sampling: Sampling,
        priority: int = 0,
        recovery: Recovery = DEFAULT_RECOVERY,
        output: Sequence[int] = (),
    ) -> None:
        """`output`: tokens that the client has already, from a request that broke off."""
        super().__init__(request, RequestState.UNPLACED)
        self.fence: Fence | None = None
        self.timings = LegTimings()
        self._prompt = prompt
        self._sampling = sampling
        self._priority = priority
        self._attempt = 0
        self.output = list(output)
        """Tokens that went to the client: the ledger is complete up to here."""
        self._resumed_at = len(output)
        """How many of them earlier attempts gave."""
        self._workers: dict[Role, WorkerKey] = {}
        """Of this attempt, or of the last one."""
        self._open: dict[Role, WorkerKey] = {}
        """Its legs that are not over."""
        self._ahead: dict[int, Emitted] = {}  # tokens that came before one of a smaller offset
        self._reason: FinishReason | None = None  # known, but tokens before it are still missing
        self._begun: set[Role] = set()  # legs of this attempt that compute, or have; decode: it has taken over
        self._budget = RetryBudget(recovery)
        self._avoid: frozenset[WorkerKey] = frozenset()
        self._keep: frozenset[WorkerKey] = frozenset()

    @property
    def ended(self) -> bool:
        return self.state in _ENDED

    @property
    def delivered(self) -> int:
        """Tokens that went to the client."""
        return len(self.output)

    # --- the beginning -----------------------------------------------------------------------------------------------

    def _placed(self, event: Placed, now: float) -> list[Action]:
        self._attempt += 1
        prefill, decode = event.prefill, event.decode
        fence = self.fence = Fence(
            self.name, self._attempt, prefill.epoch if prefill else 0, decode.epoch if decode else 0
        )
        self._resumed_at = self.delivered
        self._workers = {}
        self._begun.clear()
        self._budget.placed()
        output = list(self.output)
        actions: list[Action] = []
        # Decode first: it only makes a reservation, and then knows the fence before prefill's OFFER can come.
        if decode is not None:
            peer = prefill.worker if prefill else None
            to_decode = DecodeAttempt(fence, self._prompt, self._sampling, peer, output, self._priority)
            actions.append(Dispatch(Role.DECODE, decode, to_decode))
            self._workers[Role.DECODE] = decode
        if prefill is not None:
            peer = decode.worker if decode else None
            to_prefill = PrefillAttempt(fence, self._prompt, self._sampling, peer, output, self._priority)
            actions.append(Dispatch(Role.PREFILL, prefill, to_prefill))
            self._workers[Role.PREFILL] = prefill
        self._open = dict(self._workers)
        self.to(RequestState.PLACED)
        return actions

    def _not_placed(self, event: NotPlaced, now: float) -> list[Action]:
        """Who had a place once will have one again, when workers are back."""
        if self.fence is None and not event.expected:
            return self._fail(event.error, None)
        return [PlaceAgain(self._budget.not_placed(event.error), self._avoid, self._keep)]

    def _started(self, event: LegStarted, now: float) -> list[Action]:
        self._begun.add(event.role)
        if self.state is RequestState.PLACED:
            self.to(RequestState.PREFILLING)
        return []

    # --- tokens ------------------------------------------------------------------------------------------------------

    def _tokens(self, event: TokensArrived, now: float) -> list[Action]:
        for emitted in event.tokens:
            # A worker that goes on and on fills neither our memory nor the client's.
            if self.delivered <= emitted.offset < self._sampling.max_tokens:
                self._ahead.setdefault(emitted.offset, emitted)
            # Only a decode leg gives an attempt's second token, and it gives it after it has taken over the KV.
            if emitted.offset > self._resumed_at:
                self._begun.add(Role.DECODE)
        tokens: list[Emitted] = []
        while self.delivered in self._ahead:
            emitted = self._ahead.pop(self.delivered)
            tokens.append(emitted)
            self.output.append(emitted.token)
        if not tokens:
            return []
        if self.delivered > self._resumed_at + 1:
            self._budget.progressed()
            self._avoid = frozenset()
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
            error = ProtocolError(f"{event.role.value} cancelled {self.name} unasked")
            return self._interrupted(error, event.role, actions)
        if event.reason is FinishReason.RETRACTED:
            return self._interrupted(None, None, actions)
        if event.reason is FinishReason.HANDED_OFF:
            self._begun.add(Role.DECODE)
        else:
            self._reason = event.reason
            actions += self._finish_if_complete()
        if not self.ended and not self._open:
            error = ProtocolError(f"both legs of {self.name} have ended, but token {self.delivered} never came")
            return self._interrupted(error, event.role, actions)
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
        if Role.DECODE not in self._begun:
            actions += self._cancel(Role.PREFILL, "finished")
        return [*actions, *self._forget_if_over()]

    # --- interruptions -----------------------------------------------------------------------------------------------

    def _leg_gone(self, event: LegFailed | LegLost | LegStalled, now: float) -> list[Action]:
        if event.role not in self._open:
            return []
        if isinstance(event, LegStalled):
            closing = self._cancel(event.role, event.error.message)
        else:
            closing = self._close_leg(event)
        if event.role is Role.PREFILL and Role.DECODE in self._begun and self._has_begun:
            return closing
        blame = event.blame if isinstance(event, LegFailed) else event.role
        return self._interrupted(event.error, blame, closing)

    def _interrupted(self, error: BatonError | None, blame: Role | None, closing: list[Action]) -> list[Action]:
        """The next attempt goes on after the last token that the client got, if that was not the request's last."""
        end = natural_end(self.output, self._sampling)
        if end is not None:
            return [*closing, *self._finish(end)]
        if error is None:
            # Retracted: the worker keeps its promise to older requests. Any worker will do, that one too.
            self._keep = frozenset()
            over = AttemptOver(self._live_fence(), Interruption.RETRACTED, None, None, None)
            return [over, *closing, *self._unplace(0.0)]
        # A leg that the attempt does not have is done by the other one's worker.
        worker = self._workers.get(blame) if blame else None
        worker = worker or next(iter(self._workers.values()))
        over = AttemptOver(self._live_fence(), interruption(error), error, blame, worker)
        wait = self._budget.failed(error, innocent=innocent(error, begun=blame in self._begun))
        if wait is None:
            return [over, *closing, *self._fail(self._budget.verdict(), blame)]
        self._avoid |= {worker}
        self._keep = frozenset(self._workers.values()) - self._avoid
        return [over, *closing, *self._unplace(wait)]

    def _unplace(self, after_seconds: float) -> list[Action]:
        self._ahead.clear()
        self._reason = None
        self.to(RequestState.UNPLACED)
        again = PlaceAgain(after_seconds, self._avoid, self._keep)
        return [*self._cancel_all("it goes on as another attempt"), again]

    # --- other ends --------------------------------------------------------------------------------------------------

    def _client_gone(self, event: ClientGone, now: float) -> list[Action]:
        self.to(RequestState.CANCELLED)
        return [*self._cancel_all(event.reason), *self._forget_if_over()]

    def _deadline(self, event: DeadlinePassed, now: float) -> list[Action]:
        story = self._budget.story()
        found = f"{self.delivered} tokens sent{'; ' if story else ''}{story}"
        return self._fail(DeadlineExceeded(f"the request was not done within {event.seconds:g} s ({found})"), None)

    def _fail(self, error: BatonError, blame: Role | None) -> list[Action]:
        self.to(RequestState.FAILED)
        return [Fail(error, blame), *self._cancel_all(error.message), *self._forget_if_over()]

    # --- after the end -----------------------------------------------------------------------------------------------

    def _late_word(self, event: LegFinished | LegFailed | LegLost, now: float) -> list[Action]:
        if event.role not in self._open:
            return []
        return [*self._close_leg(event), *self._forget_if_over()]

    def _give_up_waiting(self, event: DeadlinePassed | LegStalled, now: float) -> list[Action]:
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
            self.timings.add(event.prefill, event.handoff, event.decode)
        worker = self._open.pop(event.role, None)
        well = isinstance(event, LegFinished) and event.reason in _WELL
        return [] if worker is None else [Release(event.role, worker, self._live_fence(), well)]

    def _cancel(self, role: Role, reason: str) -> list[Action]:
        worker = self._open.pop(role, None)
        if worker is None:
            return []
        fence = self._live_fence()
        return [Cancel(role, worker, CancelAttempt(fence, reason)), Release(role, worker, fence, well=False)]

    def _cancel_all(self, reason: str) -> list[Action]:
        return [*self._cancel(Role.PREFILL, reason), *self._cancel(Role.DECODE, reason)]

    def _forget_if_over(self) -> list[Action]:
        return [] if self._open else [Forget(self.fence)]

    def _live_fence(self) -> Fence:
        assert self.fence is not None, "a leg is open only after Placed"
        return self.fence

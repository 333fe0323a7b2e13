"""The life of one attempt on a prefill worker. Pure: see `cluster.state_machine`.

    QUEUED --Started--> COMPUTING --FirstToken--> HOLDING_KV --HandoffEnded--> RELEASED
                        COMPUTING --FirstToken (nobody to hand over to)-------> RELEASED
       any of them --Cancelled--> ABORTING --HandoffEnded--> RELEASED          (QUEUED: RELEASED at once)
                        COMPUTING --Refused--> ABORTING                        (nobody to hand over to: RELEASED)

ABORTING: the attempt has its outcome, but writes from its pages may be under way; they are given back when the handoff
has ended, as in every other case. RELEASED is the end, and the leg's last word goes out with it.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar

import msgspec

from cluster.errors import ErrorInfo
from cluster.messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    FinishReason,
    PrefillAttempt,
    Role,
)
from cluster.state_machine import StateMachine
from cluster.timings import HandoffTimings, PrefillTimings

ENDED_AT_FIRST_TOKEN = ErrorInfo("FinishedEarly", "the request ended with its first token: there is nothing to decode")

ENDED_TOO_EARLY = ErrorInfo("TransferFailed", "the handoff ended before its KV was computed")


class PrefillState(Enum):
    QUEUED = "queued"
    COMPUTING = "computing"
    HOLDING_KV = "holding_kv"
    ABORTING = "aborting"
    RELEASED = "released"


# --- events ----------------------------------------------------------------------------------------------------------


class Started(msgspec.Struct, frozen=True):
    """Its first chunk is about to be computed; KV of the first `cached` tokens is in its pages already, or will be by
    then: `settled` says whether it may go out."""

    cached: int = 0
    settled: bool = True


class ChunkComputed(msgspec.Struct, frozen=True):
    """KV of the first `computed` tokens is in its pages."""

    computed: int


class FirstToken(msgspec.Struct, frozen=True):
    """The prompt is computed and `token` sampled; `finished` if that token ends the request."""

    token: int
    finished: FinishReason | None


class Refused(msgspec.Struct, frozen=True):
    """The engine can't compute it, and has let go of it."""

    error: ErrorInfo


class HandoffEnded(msgspec.Struct, frozen=True):
    """No write from its pages is under way any more. `error` is None after decode's ACK."""

    error: ErrorInfo | None = None
    blame: Role | None = None
    timings: HandoffTimings | None = None


class Cancelled(msgspec.Struct, frozen=True):
    """The router does not want it any more."""

    reason: str


# --- actions ---------------------------------------------------------------------------------------------------------


class Offer(msgspec.Struct, frozen=True):
    """Begin the handoff of `tokens` tokens of KV."""

    tokens: int


class Share(msgspec.Struct, frozen=True):
    """KV of the first `computed` tokens may go out."""

    computed: int


class Complete(msgspec.Struct, frozen=True):
    """All KV is computed: finish the handoff, with the first token."""

    first_token: int


class StopHandoff(msgspec.Struct, frozen=True):
    error: ErrorInfo


class DropSequence(msgspec.Struct, frozen=True):
    """Take it out of the scheduler; its pages stay its own."""


class ReleasePages(msgspec.Struct, frozen=True):
    pass


class Report(msgspec.Struct, frozen=True):
    """Tell the router."""

    message: AttemptStarted | AttemptFinished | AttemptFailed


Action = Offer | Share | Complete | StopHandoff | DropSequence | ReleasePages | Report


class PrefillMachine(StateMachine[Action]):
    """One attempt. `attempt.decode` is None when the first token is all that is wanted."""

    TABLE: ClassVar = {
        (PrefillState.QUEUED, Started): "_start",
        (PrefillState.QUEUED, Cancelled): "_cancel_queued",
        (PrefillState.COMPUTING, ChunkComputed): "_share",
        (PrefillState.COMPUTING, FirstToken): "_first_token",
        (PrefillState.COMPUTING, Refused): "_refuse",
        (PrefillState.COMPUTING, HandoffEnded): "_lose_while_computing",
        (PrefillState.COMPUTING, Cancelled): "_cancel_computing",
        (PrefillState.HOLDING_KV, HandoffEnded): "_handed_over",
        (PrefillState.HOLDING_KV, Cancelled): "_cancel_holding",
        (PrefillState.ABORTING, HandoffEnded): "_aborted",
        (PrefillState.ABORTING, Cancelled): "_ignore",
    }

    def __init__(self, attempt: PrefillAttempt, now: float) -> None:
        super().__init__(str(attempt.fence), PrefillState.QUEUED)
        self.attempt = attempt
        self._tokens = len(attempt.prompt) + len(attempt.output)
        self._queued_at = now
        self._started_at = now
        self._computed_at = now
        self._chunks = 0
        self._cached = 0
        self._reason = FinishReason.CANCELLED
        """Of a leg that ends without a handoff."""
        self._refusal: ErrorInfo | None = None

    def _start(self, event: Started, now: float) -> list[Action]:
        self._started_at = now
        self._cached = event.cached
        self.to(PrefillState.COMPUTING)
        actions: list[Action] = [Report(AttemptStarted(self.attempt.fence, Role.PREFILL, event.cached))]
        if self.attempt.decode is not None:
            actions.append(Offer(self._tokens))
            if event.cached and event.settled:
                actions.append(Share(event.cached))
        return actions

    def _share(self, event: ChunkComputed, now: float) -> list[Action]:
        self._chunks += 1
        self._computed_at = now
        return [Share(event.computed)] if self.attempt.decode is not None else []

    def _first_token(self, event: FirstToken, now: float) -> list[Action]:
        if self.attempt.decode is None:
            self._reason = event.finished or FinishReason.LENGTH
            return self._release(self._finished(self._reason))
        if event.finished is not None:
            self._reason = event.finished
            self.to(PrefillState.ABORTING)
            return [StopHandoff(ENDED_AT_FIRST_TOKEN)]
        self.to(PrefillState.HOLDING_KV)
        return [Complete(event.token)]

    def _refuse(self, event: Refused, now: float) -> list[Action]:
        self._refusal = event.error
        if self.attempt.decode is None:
            return self._release(self._refused(event.error))
        self.to(PrefillState.ABORTING)
        return [StopHandoff(event.error)]

    def _handed_over(self, event: HandoffEnded, now: float) -> list[Action]:
        if event.error is not None:
            return self._release(self._failed(event))
        return self._release(self._finished(FinishReason.HANDED_OFF, event.timings))

    def _lose_while_computing(self, event: HandoffEnded, now: float) -> list[Action]:
        return [DropSequence(), *self._release(self._failed(event))]

    def _aborted(self, event: HandoffEnded, now: float) -> list[Action]:
        if self._refusal is not None:
            return self._release(self._refused(self._refusal))
        return self._release(self._finished(self._reason))

    def _cancel_queued(self, event: Cancelled, now: float) -> list[Action]:
        return [DropSequence(), *self._release(self._finished(FinishReason.CANCELLED))]

    def _cancel_computing(self, event: Cancelled, now: float) -> list[Action]:
        if self.attempt.decode is None:
            return [DropSequence(), *self._release(self._finished(FinishReason.CANCELLED))]
        return [DropSequence(), *self._cancel_holding(event, now)]

    def _cancel_holding(self, event: Cancelled, now: float) -> list[Action]:
        self.to(PrefillState.ABORTING)
        return [StopHandoff(ErrorInfo("Cancelled", event.reason))]

    def _ignore(self, event: Cancelled, now: float) -> list[Action]:
        return []

    def _release(self, last_word: Report) -> list[Action]:
        self.to(PrefillState.RELEASED)
        return [ReleasePages(), last_word]

    def _finished(self, reason: FinishReason, handoff: HandoffTimings | None = None) -> Report:
        timings = PrefillTimings(
            queue_seconds=self._started_at - self._queued_at,
            compute_seconds=self._computed_at - self._started_at,
            tokens=self._tokens,
            cached_tokens=self._cached,
            chunks=self._chunks,
        )
        return Report(
            AttemptFinished(
                self.attempt.fence, Role.PREFILL, reason, prefill=timings if self._chunks else None, handoff=handoff
            )
        )

    def _refused(self, error: ErrorInfo) -> Report:
        return Report(AttemptFailed(self.attempt.fence, Role.PREFILL, Role.PREFILL, error))

    def _failed(self, event: HandoffEnded) -> Report:
        """An error without blame is the decode leg's cancel: it has given up on its own."""
        if event.error is None:
            return Report(AttemptFailed(self.attempt.fence, Role.PREFILL, Role.PREFILL, ENDED_TOO_EARLY))
        return Report(AttemptFailed(self.attempt.fence, Role.PREFILL, event.blame or Role.DECODE, event.error))

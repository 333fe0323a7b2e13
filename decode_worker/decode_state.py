"""The life of one attempt on a decode worker. Pure: see `cluster.state_machine`.

    RESERVING --OfferArrived--> OFFERED --PagesLeased--> AWAITING_KV --KVArrived--> RUNNING --Sampled (last)--> FINISHED
    PREFILLING --Sampled--> RUNNING                                       (unified: no prefill leg, it begins here)
       any of them --Cancelled--> FINISHED         before RUNNING --HandoffFailed--> FINISHED
       PREFILLING, RUNNING --Retracted, Refused--> FINISHED

RESERVING holds no pages; AWAITING_KV has leased them to the writer. An attempt that ends while its pages are leased
ends at once: the pages alone stay, in quarantine, until `kv_transfer` says that the lease has ended.
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
    DecodeAttempt,
    FinishReason,
    Role,
)
from cluster.state_machine import StateMachine
from cluster.timings import DecodeTimings, PrefillTimings


class DecodeState(Enum):
    RESERVING = "reserving"
    OFFERED = "offered"
    AWAITING_KV = "awaiting_kv"
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"


# --- events ----------------------------------------------------------------------------------------------------------


class OfferArrived(msgspec.Struct, frozen=True):
    """The prefill leg computes, and wants pages."""


class PagesLeased(msgspec.Struct, frozen=True):
    """The ledger had pages: for the prompt leased to the writer, for the output kept."""


class KVArrived(msgspec.Struct, frozen=True):
    """Verified and acknowledged; the pages are ours. `token` is the first of the output."""

    token: int
    verify_seconds: float
    """DONE received until then."""


class HandoffFailed(msgspec.Struct, frozen=True):
    """No KV will come. `blame` None: the prefill leg was cancelled, or ended the request with its first token."""

    error: ErrorInfo
    blame: Role | None


class PrefillStarted(msgspec.Struct, frozen=True):
    """Unified: its first chunk is about to be computed; KV of the first `cached` tokens is here already."""

    cached: int = 0


class ChunkComputed(msgspec.Struct, frozen=True):
    """Unified: one more chunk of its prompt is computed."""


class Sampled(msgspec.Struct, frozen=True):
    """One token more, in a step of `batch_size` sequences; `finished` if it is the last."""

    batch_size: int
    finished: FinishReason | None


class Retracted(msgspec.Struct, frozen=True):
    """The scheduler has taken it out: older ones need its pages."""


class Refused(msgspec.Struct, frozen=True):
    """The engine can't compute it, and has let go of it."""

    error: ErrorInfo


class Cancelled(msgspec.Struct, frozen=True):
    reason: str


# --- actions ---------------------------------------------------------------------------------------------------------


class LeasePages(msgspec.Struct, frozen=True):
    """Get pages as soon as there are enough, grant them, and feed back `PagesLeased`."""


class Submit(msgspec.Struct, frozen=True):
    """Into the scheduler, after `first_token` (None: unified, from the prompt's beginning)."""

    first_token: int | None


class StopHandoff(msgspec.Struct, frozen=True):
    error: ErrorInfo


class QuarantinePages(msgspec.Struct, frozen=True):
    """They stay out of use until the lease's end."""


class DropSequence(msgspec.Struct, frozen=True):
    """Take it out of the scheduler."""


class ReleasePages(msgspec.Struct, frozen=True):
    pass


class Report(msgspec.Struct, frozen=True):
    """Tell the router."""

    message: AttemptStarted | AttemptFinished | AttemptFailed


Action = LeasePages | Submit | StopHandoff | QuarantinePages | DropSequence | ReleasePages | Report


class DecodeMachine(StateMachine[Action]):
    """One attempt. `begin` gives the first actions; then `handle`."""

    TABLE: ClassVar = {
        (DecodeState.RESERVING, OfferArrived): "_offered",
        (DecodeState.RESERVING, HandoffFailed): "_fail_without_pages",
        (DecodeState.RESERVING, Cancelled): "_cancel_reserving",
        (DecodeState.OFFERED, PagesLeased): "_leased",
        (DecodeState.OFFERED, HandoffFailed): "_fail_without_pages",
        (DecodeState.OFFERED, Cancelled): "_cancel_offered",
        (DecodeState.AWAITING_KV, KVArrived): "_run",
        (DecodeState.AWAITING_KV, HandoffFailed): "_fail_leased",
        (DecodeState.AWAITING_KV, Cancelled): "_cancel_leased",
        (DecodeState.PREFILLING, PrefillStarted): "_prefill_started",
        (DecodeState.PREFILLING, ChunkComputed): "_chunk_computed",
        (DecodeState.PREFILLING, Sampled): "_first_own_token",
        (DecodeState.PREFILLING, Retracted): "_retract",
        (DecodeState.PREFILLING, Refused): "_refuse",
        (DecodeState.PREFILLING, Cancelled): "_cancel_running",
        (DecodeState.RUNNING, Sampled): "_sampled",
        (DecodeState.RUNNING, Retracted): "_retract",
        (DecodeState.RUNNING, Refused): "_refuse",
        (DecodeState.RUNNING, Cancelled): "_cancel_running",
    }

    def __init__(self, attempt: DecodeAttempt, now: float) -> None:
        unified = attempt.prefill is None
        super().__init__(str(attempt.fence), DecodeState.PREFILLING if unified else DecodeState.RESERVING)
        self.attempt = attempt
        self._received_at = now
        self._offered_at = now
        self._leased_at = now
        self._prefill_started_at = now
        self._prefilled_at = now
        self._running_since = now
        self._first_step_seconds = 0.0
        self._verify_seconds = 0.0
        self._chunks = 0
        self._cached = 0
        self._steps = 0
        self._batch_sum = 0
        self._batch_max = 0

    def begin(self) -> list[Action]:
        """The actions that the attempt's arrival asks for."""
        return [Submit(None)] if self.state is DecodeState.PREFILLING else []

    def _offered(self, event: OfferArrived, now: float) -> list[Action]:
        self._offered_at = self._leased_at = now
        self.to(DecodeState.OFFERED)
        return [LeasePages()]

    def _leased(self, event: PagesLeased, now: float) -> list[Action]:
        self._leased_at = now
        self.to(DecodeState.AWAITING_KV)
        return []

    def _run(self, event: KVArrived, now: float) -> list[Action]:
        self._running_since = now
        self._verify_seconds = event.verify_seconds
        self.to(DecodeState.RUNNING)
        return [Submit(event.token), Report(AttemptStarted(self.attempt.fence, Role.DECODE))]

    def _prefill_started(self, event: PrefillStarted, now: float) -> list[Action]:
        self._prefill_started_at = now
        self._cached = event.cached
        return [Report(AttemptStarted(self.attempt.fence, Role.DECODE, event.cached))]

    def _chunk_computed(self, event: ChunkComputed, now: float) -> list[Action]:
        self._chunks += 1
        self._prefilled_at = now
        return []

    def _first_own_token(self, event: Sampled, now: float) -> list[Action]:
        self._running_since = now
        self.to(DecodeState.RUNNING)
        return self._end(event.finished, now) if event.finished is not None else []

    def _sampled(self, event: Sampled, now: float) -> list[Action]:
        if self._steps == 0:
            self._first_step_seconds = now - self._running_since
        self._steps += 1
        self._batch_sum += event.batch_size
        self._batch_max = max(self._batch_max, event.batch_size)
        return self._end(event.finished, now) if event.finished is not None else []

    def _fail_without_pages(self, event: HandoffFailed, now: float) -> list[Action]:
        self.to(DecodeState.FINISHED)
        return [self._handoff_failed(event, now)]

    def _fail_leased(self, event: HandoffFailed, now: float) -> list[Action]:
        self.to(DecodeState.FINISHED)
        return [QuarantinePages(), self._handoff_failed(event, now)]

    def _cancel_reserving(self, event: Cancelled, now: float) -> list[Action]:
        self.to(DecodeState.FINISHED)
        return [self._finished(FinishReason.CANCELLED, now)]

    def _cancel_offered(self, event: Cancelled, now: float) -> list[Action]:
        return [StopHandoff(ErrorInfo("Cancelled", event.reason)), *self._cancel_reserving(event, now)]

    def _cancel_leased(self, event: Cancelled, now: float) -> list[Action]:
        return [QuarantinePages(), *self._cancel_offered(event, now)]

    def _cancel_running(self, event: Cancelled, now: float) -> list[Action]:
        return [DropSequence(), *self._end(FinishReason.CANCELLED, now)]

    def _retract(self, event: Retracted, now: float) -> list[Action]:
        return self._end(FinishReason.RETRACTED, now)

    def _refuse(self, event: Refused, now: float) -> list[Action]:
        self.to(DecodeState.FINISHED)
        return [ReleasePages(), Report(AttemptFailed(self.attempt.fence, Role.DECODE, Role.DECODE, event.error))]

    def _end(self, reason: FinishReason, now: float) -> list[Action]:
        self.to(DecodeState.FINISHED)
        return [ReleasePages(), self._finished(reason, now)]

    def _finished(self, reason: FinishReason, now: float) -> Report:
        prefill = None
        if self._chunks:
            prefill = PrefillTimings(
                queue_seconds=self._prefill_started_at - self._received_at,
                compute_seconds=self._prefilled_at - self._prefill_started_at,
                tokens=len(self.attempt.prompt) + len(self.attempt.output),
                cached_tokens=self._cached,
                chunks=self._chunks,
            )
        timings = DecodeTimings(
            await_seconds=self._running_since - self._received_at,
            decode_seconds=now - self._running_since,
            steps=self._steps,
            batch_sum=self._batch_sum,
            prefill=prefill,
            batch_max=self._batch_max,
            lease_seconds=self._leased_at - self._offered_at,
            verify_seconds=self._verify_seconds,
            first_step_seconds=self._first_step_seconds,
        )
        return Report(AttemptFinished(self.attempt.fence, Role.DECODE, reason, decode=timings))

    def _handoff_failed(self, event: HandoffFailed, now: float) -> Report:
        if event.blame is None:
            return self._finished(FinishReason.CANCELLED, now)
        return Report(AttemptFailed(self.attempt.fence, Role.DECODE, event.blame, event.error))

"""One lease of pages as the decode side sees it: OFFER, GRANT, DONE, verify, ACK; or ABORT, quarantine, free.

    OFFERED --GrantPages--> GRANTED --DoneArrived--> VERIFYING --Verified--> ENDED (the pages are ours, with KV)
       |                       |\\                        |
       |                       | (failure, cancel)       | (damaged, or given up)
       |                       |  \\--> QUARANTINED       |
       |                       |          | AbortedArrived, WriterFenced
       |                       \\---> SETTLING            |
       \\--(refused, lost)--> ENDED <-----/---------------/  (the pages are ours, empty)

Its promise: from GrantPages on the pages have one writer, who is not us. They come back exactly once, by `Accept` or by
`EndLease`, and only on that writer's word (DONE, ABORTED) or with proof that it is dead. No clock is involved.

It never waits without an end, whatever is lost on the way, but for the pages' sake:

    in           for                     said again                until at most
    OFFERED      our own worker          -                         `expires_at`
    GRANTED      DONE                    GRANT: timer, reconnect   `expires_at`; a writer that has ended says ABORTED
    VERIFYING    our transfer thread     -                         the pages are read
    QUARANTINED  ABORTED, DONE, a proof  ABORT: timer, reconnect   the worker's limit (`decode_worker.quarantine_state`)
    SETTLING     our transfer thread     -                         `kv_transfer.driver.SETTLE_SECONDS`
    (gone)       -                       ACK or ABORT, when asked  -
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from math import inf
from typing import Union

from cluster.errors import ErrorInfo, TransferFailed, WorkerLost
from cluster.messages import Abort, Ack, Fence, Grant, Role
from cluster.state_machine import StateMachine
from kv_transfer.repeats import Repeats


class ReceiverState(Enum):
    OFFERED = auto()
    """Our worker has not decided yet; no pages are involved."""
    GRANTED = auto()
    """The writer may write into the pages at any moment."""
    VERIFYING = auto()
    """The writer has said that it is done; we read the pages and compare digests."""
    QUARANTINED = auto()
    """Nobody wants the pages' content any more, but the writer may still write."""
    SETTLING = auto()
    """The writer has ended without success; what our own kernel still holds of its bytes is being drained."""
    ENDED = auto()


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfferedAgain:
    """The offer was repeated."""


@dataclass(frozen=True)
class GrantPages:
    pages: tuple[int, ...]
    skip_tokens: int


@dataclass(frozen=True)
class GivenUp:
    """Our own side refuses or cancels; `blame` None: a cancel."""

    error: ErrorInfo
    blame: Role | None


@dataclass(frozen=True)
class DoneArrived:
    first_token: int
    digests: tuple[int, ...]


@dataclass(frozen=True)
class Verified:
    """Digests of the pages as they are here; empty when they are not checked."""

    digests: tuple[int, ...]


@dataclass(frozen=True)
class AbortedArrived:
    """The writer's word that it has ended."""

    error: ErrorInfo
    blame: Role | None


@dataclass(frozen=True)
class PeerUp:
    """The writer's instance is connected (again)."""


@dataclass(frozen=True)
class PeerDown:
    """Its connection broke; it may live on."""


@dataclass(frozen=True)
class WriterFenced:
    """Proof that it is dead."""


@dataclass(frozen=True)
class DeadlinePassed:
    """It has expired; see `ReceiverLease.timer`."""


@dataclass(frozen=True)
class RepeatDue:
    """What we have said last is unanswered; see `ReceiverLease.timer`."""


@dataclass(frozen=True)
class PagesSettled:
    """Nothing is on its way any more."""


# --- actions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    message: Grant | Ack | Abort


@dataclass(frozen=True)
class Expect:
    """A peer may write to us from now on."""


@dataclass(frozen=True)
class Verify:
    """Compute the digests of `pages`, and tell by `Verified`."""

    pages: tuple[int, ...]


@dataclass(frozen=True)
class DrainWrites:
    """Let what is on its way land, and tell by `PagesSettled`."""


@dataclass(frozen=True)
class Accept:
    """The KV is here and whole; the pages are ours. `verify_seconds`: since DONE."""

    first_token: int
    verify_seconds: float


@dataclass(frozen=True)
class Fail:
    """Tell our worker at once; the pages may still be the writer's."""

    error: ErrorInfo
    blame: Role | None


@dataclass(frozen=True)
class EndLease:
    """The pages may be reused from now on."""


ReceiverAction = Union[Send, Expect, Verify, DrainWrites, Accept, Fail, EndLease]


class ReceiverLease(StateMachine[ReceiverAction]):
    """See the module's docstring. `answer` is what a message that comes after the end is answered with."""

    def __init__(self, fence: Fence, tokens: int, page_size: int, digests: bool, expires_at: float = inf) -> None:
        super().__init__(f"receiver {fence}", ReceiverState.OFFERED)
        self.fence = fence
        self.tokens = tokens
        self.answer: Ack | Abort | None = None
        self._expires_at = expires_at
        self._repeats = Repeats()
        self._page_size = page_size
        self._with_digests = digests
        self._grant: Grant | None = None
        self._done: DoneArrived | None = None
        self._done_at = 0.0

    def timer(self, now: float) -> DeadlinePassed | RepeatDue | None:
        """The event that is due by now, if any; ask a few times a second."""
        if self.accepts(DeadlinePassed) and now >= self._expires_at:
            return DeadlinePassed()
        return RepeatDue() if self.accepts(RepeatDue) and self._repeats.is_due(now) else None

    # --- OFFERED -----------------------------------------------------------------------------------------------------

    def _give(self, event: GrantPages, now: float) -> list[ReceiverAction]:
        total = -(-self.tokens // self._page_size)
        skipped, rest = divmod(event.skip_tokens, self._page_size)
        if rest or not 0 <= skipped <= total or len(event.pages) != total - skipped:
            raise ValueError(f"{self.name}: {len(event.pages)} pages, {event.skip_tokens} skipped of {self.tokens}")
        self._grant = Grant(self.fence, list(event.pages), event.skip_tokens)
        self._repeats.start(now)
        self.to(ReceiverState.GRANTED)
        return [Expect(), Send(self._grant)]

    def _give_too_late(self, event: GrantPages, now: float) -> list[ReceiverAction]:
        """It failed before our worker knew: nobody has been told of these pages."""
        return [EndLease()]

    def _refuse(self, event: GivenUp, now: float) -> list[ReceiverAction]:
        return [self._abort(event.error, event.blame), *self._end()]

    def _withdrawn(self, event: AbortedArrived, now: float) -> list[ReceiverAction]:
        self._abort(event.error, event.blame)
        return [Fail(event.error, event.blame), *self._end()]

    def _lost_early(self, event: PeerDown | WriterFenced, now: float) -> list[ReceiverAction]:
        error = WorkerLost("the prefill worker was lost before its KV was awaited").to_info()
        self._abort(error, Role.PREFILL)
        return [Fail(error, Role.PREFILL), *self._end()]

    def _expire_unanswered(self, event: DeadlinePassed, now: float) -> list[ReceiverAction]:
        error = TransferFailed("the decode worker had no pages for its KV in time").to_info()
        return [self._abort(error, Role.DECODE), Fail(error, Role.DECODE), *self._end()]

    # --- GRANTED -----------------------------------------------------------------------------------------------------

    def _grant_again(self, event: OfferedAgain | PeerUp, now: float) -> list[ReceiverAction]:
        assert self._grant is not None
        self._repeats.start(now)
        return [Send(self._grant)]

    def _repeat_grant(self, event: RepeatDue, now: float) -> list[ReceiverAction]:
        """Also a question: a writer that has ended unheard answers ABORTED."""
        assert self._grant is not None
        self._repeats.again(now)
        return [Send(self._grant)]

    def _verify(self, event: DoneArrived, now: float) -> list[ReceiverAction]:
        """DONE is the writer's last word on the pages, whatever we find in them."""
        assert self._grant is not None
        self._done, self._done_at = event, now
        self.to(ReceiverState.VERIFYING)
        return [Verify(tuple(self._grant.pages))]

    def _ended_early(self, event: AbortedArrived, now: float) -> list[ReceiverAction]:
        self._abort(event.error, event.blame)
        return [Fail(event.error, event.blame), *self._drain()]

    def _killed(self, event: WriterFenced, now: float) -> list[ReceiverAction]:
        error = WorkerLost("the prefill worker died while it was writing KV").to_info()
        self._abort(error, Role.PREFILL)
        return [Fail(error, Role.PREFILL), *self._drain()]

    def _lost(self, event: PeerDown, now: float) -> list[ReceiverAction]:
        error = WorkerLost("the connection to the prefill worker broke while it was writing KV").to_info()
        self._quarantine(error, Role.PREFILL, now)  # the ABORT itself goes out when it is connected again
        return [Fail(error, Role.PREFILL)]

    def _expire(self, event: DeadlinePassed, now: float) -> list[ReceiverAction]:
        error = TransferFailed("the prefill worker did not write its KV in time").to_info()
        return [self._quarantine(error, Role.PREFILL, now), Fail(error, Role.PREFILL)]

    def _cancel(self, event: GivenUp, now: float) -> list[ReceiverAction]:
        return [self._quarantine(event.error, event.blame, now)]

    def _quarantine(self, error: ErrorInfo, blame: Role | None, now: float) -> Send:
        self._repeats.start(now)
        self.to(ReceiverState.QUARANTINED)
        return self._abort(error, blame)

    # --- VERIFYING ---------------------------------------------------------------------------------------------------

    def _verified(self, event: Verified, now: float) -> list[ReceiverAction]:
        assert self._done is not None
        assert self._grant is not None
        if self._with_digests and event.digests != self._done.digests:
            return self._damaged(event.digests, self._done.digests)
        self.answer = Ack(self.fence)
        self.to(ReceiverState.ENDED)
        return [Send(self.answer), Accept(self._done.first_token, now - self._done_at)]

    def _damaged(self, found: Sequence[int], expected: Sequence[int]) -> list[ReceiverAction]:
        """The writer and its engine are to blame: the bytes were theirs until DONE."""
        wrong = sum(ours != theirs for ours, theirs in zip(found, expected, strict=False))
        wrong += abs(len(found) - len(expected))
        error = TransferFailed(f"{wrong} of {len(found)} KV pages arrived damaged").to_info()
        return [self._abort(error, Role.PREFILL), Fail(error, Role.PREFILL), EndLease(), *self._end()]

    def _taken_back(self, event: AbortedArrived, now: float) -> list[ReceiverAction]:
        """The writer was cancelled while it waited for our ACK."""
        self._abort(event.error, event.blame)
        return [Fail(event.error, event.blame), EndLease(), *self._end()]

    def _drop(self, event: GivenUp, now: float) -> list[ReceiverAction]:
        return [self._abort(event.error, event.blame), EndLease(), *self._end()]

    # --- QUARANTINED, SETTLING ---------------------------------------------------------------------------------------

    def _abort_again(self, event: PeerUp | OfferedAgain, now: float) -> list[ReceiverAction]:
        assert self.answer is not None
        self._repeats.start(now)
        return [Send(self.answer)]

    def _repeat_abort(self, event: RepeatDue, now: float) -> list[ReceiverAction]:
        assert self.answer is not None
        self._repeats.again(now)
        return [Send(self.answer)]

    def _fenced(self, event: AbortedArrived | DoneArrived | WriterFenced, now: float) -> list[ReceiverAction]:
        """Its answer to our ABORT, a DONE that crossed it, or its death: no write will come."""
        return self._drain()

    def _settled(self, event: PagesSettled, now: float) -> list[ReceiverAction]:
        return [EndLease(), *self._end()]

    def _ignore(self, event: object, now: float) -> list[ReceiverAction]:
        return []

    # --- common ------------------------------------------------------------------------------------------------------

    def _abort(self, error: ErrorInfo, blame: Role | None) -> Send:
        """Settles what the other side hears from now on."""
        self.answer = Abort(self.fence, error, blame)
        return Send(self.answer)

    def _drain(self) -> list[ReceiverAction]:
        self.to(ReceiverState.SETTLING)
        return [DrainWrites()]

    def _end(self) -> list[ReceiverAction]:
        self.to(ReceiverState.ENDED)
        return []

    TABLE = {
        (ReceiverState.OFFERED, OfferedAgain): "_ignore",
        (ReceiverState.OFFERED, GrantPages): "_give",
        (ReceiverState.OFFERED, GivenUp): "_refuse",
        (ReceiverState.OFFERED, AbortedArrived): "_withdrawn",
        (ReceiverState.OFFERED, PeerUp): "_ignore",
        (ReceiverState.OFFERED, PeerDown): "_lost_early",
        (ReceiverState.OFFERED, WriterFenced): "_lost_early",
        (ReceiverState.OFFERED, DeadlinePassed): "_expire_unanswered",
        (ReceiverState.GRANTED, OfferedAgain): "_grant_again",
        (ReceiverState.GRANTED, GivenUp): "_cancel",
        (ReceiverState.GRANTED, DoneArrived): "_verify",
        (ReceiverState.GRANTED, AbortedArrived): "_ended_early",
        (ReceiverState.GRANTED, PeerUp): "_grant_again",
        (ReceiverState.GRANTED, PeerDown): "_lost",
        (ReceiverState.GRANTED, WriterFenced): "_killed",
        (ReceiverState.GRANTED, DeadlinePassed): "_expire",
        (ReceiverState.GRANTED, RepeatDue): "_repeat_grant",
        (ReceiverState.VERIFYING, OfferedAgain): "_ignore",
        (ReceiverState.VERIFYING, GivenUp): "_drop",
        (ReceiverState.VERIFYING, DoneArrived): "_ignore",
        (ReceiverState.VERIFYING, Verified): "_verified",
        (ReceiverState.VERIFYING, AbortedArrived): "_taken_back",
        # All bytes are here: neither a broken connection nor the writer's death can take them away.
        (ReceiverState.VERIFYING, PeerUp): "_ignore",
        (ReceiverState.VERIFYING, PeerDown): "_ignore",
        (ReceiverState.VERIFYING, WriterFenced): "_ignore",
        (ReceiverState.QUARANTINED, OfferedAgain): "_abort_again",
        (ReceiverState.QUARANTINED, GivenUp): "_ignore",
        (ReceiverState.QUARANTINED, DoneArrived): "_fenced",
        (ReceiverState.QUARANTINED, AbortedArrived): "_fenced",
        (ReceiverState.QUARANTINED, PeerUp): "_abort_again",
        (ReceiverState.QUARANTINED, PeerDown): "_ignore",
        (ReceiverState.QUARANTINED, WriterFenced): "_fenced",
        (ReceiverState.QUARANTINED, RepeatDue): "_repeat_abort",
        (ReceiverState.SETTLING, OfferedAgain): "_abort_again",
        (ReceiverState.SETTLING, GivenUp): "_ignore",
        (ReceiverState.SETTLING, DoneArrived): "_ignore",
        (ReceiverState.SETTLING, AbortedArrived): "_ignore",
        (ReceiverState.SETTLING, PeerUp): "_ignore",
        (ReceiverState.SETTLING, PeerDown): "_ignore",
        (ReceiverState.SETTLING, WriterFenced): "_ignore",
        (ReceiverState.SETTLING, PagesSettled): "_settled",
        # Between the end and the caller's next `poll`:
        (ReceiverState.ENDED, GrantPages): "_give_too_late",
        (ReceiverState.ENDED, GivenUp): "_ignore",
    }

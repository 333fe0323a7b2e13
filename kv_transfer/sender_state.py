"""One handoff as the prefill side sees it: OFFER, pages out as they are computed, DONE, ACK; or ABORTED.

    UNCONNECTED --PeerUp--> OFFERED --Granted--> SENDING --(all written)--> HOLDING --Acked--> ENDED
         \\___________________\\___________________\\______(failure, abort, cancel)__\\____/
                                                    \\--> STOPPING (writes under way) --/

Its promise: `Release` comes exactly once, and only when no write is under way and none will come. Only then may our
source pages be reused; and only then ABORTED may tell the receiver that its own pages are free.

It never waits without an end, whatever is lost on the way:

    in           for                     said again                until at most
    UNCONNECTED  the connection          -                         `connect_timeout`
    OFFERED      GRANT                   OFFER: timer, reconnect   `expires_at`
    SENDING      our own chunks, writes  -                         `expires_at`; writes: see `kv_transfer.driver`
    HOLDING      ACK                     DONE: timer, reconnect    `expires_at`; unconnected: `connect_timeout`
    STOPPING     our own writes          -                         the driver ends them, or the process
    (gone)       -                       ABORTED, when asked       -
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from math import inf
from typing import Union

from cluster.errors import BatonError, ErrorInfo, PeerUnreachable, ProtocolError, TransferFailed, WorkerLost
from cluster.messages import Aborted, Done, Fence, Grant, Offer, Role
from cluster.state_machine import StateMachine
from cluster.timings import HandoffTimings
from kv_transfer.plan import Batch, WritePlan
from kv_transfer.repeats import Repeats


class SenderState(Enum):
    UNCONNECTED = auto()
    """The decode worker's connection is not up (yet)."""
    OFFERED = auto()
    SENDING = auto()
    """Granted; chunks may still be being computed."""
    HOLDING = auto()
    """All written, DONE said; our pages are held until the ACK."""
    STOPPING = auto()
    """It has failed; writes are still under way."""
    ENDED = auto()


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeerUp:
    """The decode instance of our fence is connected (again)."""


@dataclass(frozen=True)
class PeerDown:
    """Its connection broke."""


@dataclass(frozen=True)
class PeerReplaced:
    """A later instance is connected in its place: ours is gone for good."""


@dataclass(frozen=True)
class DeadlinePassed:
    """It was not connected for too long, or has expired; see `SenderHandoff.timer`."""


@dataclass(frozen=True)
class RepeatDue:
    """What we have said last is unanswered; see `SenderHandoff.timer`."""


@dataclass(frozen=True)
class Granted:
    grant: Grant


@dataclass(frozen=True)
class Computed:
    pages: Sequence[int]
    tokens: int


@dataclass(frozen=True)
class Finished:
    first_token: int


@dataclass(frozen=True)
class BatchEnded:
    """A batch of writes is terminal. Times are of the clock that `now` is of."""

    batch: Batch
    error: BatonError | None
    digests: tuple[int, ...]
    started: float
    ended: float


@dataclass(frozen=True)
class Acked:
    """The receiver has verified the pages and taken them over."""


@dataclass(frozen=True)
class AbortAsked:
    """The receiver wants no more of it."""

    error: ErrorInfo
    blame: Role | None


@dataclass(frozen=True)
class Cancelled:
    """Our own side wants no more of it."""

    error: ErrorInfo


# --- actions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    message: Offer | Done | Aborted


@dataclass(frozen=True)
class Post:
    batch: Batch


@dataclass(frozen=True)
class Release:
    """It is over. `blame` None with an error: it was cancelled."""

    error: ErrorInfo | None
    blame: Role | None
    timings: HandoffTimings | None


SenderAction = Union[Send, Post, Release]


class SenderHandoff(StateMachine[SenderAction]):
    """See the module's docstring. `connect_timeout` is in seconds, `page_bytes` is for the timings."""

    def __init__(
        self,
        fence: Fence,
        plan: WritePlan,
        page_bytes: int,
        connect_timeout: float,
        now: float,
        digests: bool,
        expires_at: float = inf,
    ) -> None:
        super().__init__(f"sender {fence}", SenderState.UNCONNECTED)
        self.fence = fence
        self._plan = plan
        self._page_bytes = page_bytes
        self._connect_timeout = connect_timeout
        self._connect_by = now + connect_timeout
        """inf while it is connected."""
        self._expires_at = expires_at
        self._repeats = Repeats()
        self._with_digests = digests
        self._in_flight = 0
        self._digests: dict[int, int] = {}
        self._first_token: int | None = None
        self._outcome: tuple[ErrorInfo, Role | None] | None = None
        self._offered_at = now
        self._granted_at = now
        self._computed_at = now
        self._done_at = now
        self._batches = 0
        self._write_seconds = 0.0
        self._written_until = now

    @property
    def at_its_last_write(self) -> bool:
        """Nothing but writes that are under way stands before DONE."""
        return self.state is SenderState.SENDING and self._first_token is not None

    def timer(self, now: float) -> DeadlinePassed | RepeatDue | None:
        """The event that is due by now, if any; ask a few times a second."""
        if not self.accepts(DeadlinePassed):
            return None
        if now >= min(self._connect_by, self._expires_at):
            return DeadlinePassed()
        return RepeatDue() if self._repeats.is_due(now) else None

    # --- the connection ----------------------------------------------------------------------------------------------

    def _offer(self, event: PeerUp, now: float) -> list[SenderAction]:
        if self.state is SenderState.UNCONNECTED:
            self._offered_at = now
        self._connect_by = inf
        self._repeats.start(now)
        self.to(SenderState.OFFERED)
        return [Send(Offer(self.fence, self._plan.tokens))]

    def _wait_for_peer(self, event: PeerDown, now: float) -> list[SenderAction]:
        """No page was granted to us yet, as far as we know: offer again when it is back."""
        self._disconnected(now)
        self.to(SenderState.UNCONNECTED)
        return []

    def _wait_for_ack(self, event: PeerDown, now: float) -> list[SenderAction]:
        """All is written: if the receiver lives, it may well be decoding from our pages already."""
        self._disconnected(now)
        return []

    def _disconnected(self, now: float) -> None:
        self._connect_by = now + self._connect_timeout
        self._repeats.stop()

    def _done_again(self, event: PeerUp, now: float) -> list[SenderAction]:
        self._connect_by = inf
        self._repeats.start(now)
        return [self._done()]

    def _repeat_offer(self, event: RepeatDue, now: float) -> list[SenderAction]:
        self._repeats.again(now)
        return [Send(Offer(self.fence, self._plan.tokens))]

    def _repeat_done(self, event: RepeatDue, now: float) -> list[SenderAction]:
        self._repeats.again(now)
        return [self._done()]

    def _lost(self, event: PeerDown, now: float) -> list[SenderAction]:
        return self._fail(WorkerLost("the connection to the decode worker broke").to_info(), Role.DECODE)

    def _replaced(self, event: PeerReplaced, now: float) -> list[SenderAction]:
        return self._fail(WorkerLost("the decode worker was restarted").to_info(), Role.DECODE)

    def _too_late(self, event: DeadlinePassed, now: float) -> list[SenderAction]:
        if now >= self._connect_by:
            message = f"the decode worker is not connected since {self._connect_timeout:g} s"
            return self._fail(WorkerLost(message).to_info(), Role.DECODE)
        error = TransferFailed(f"the handoff has expired in {self.state.name}").to_info()
        return self._fail(error, Role.PREFILL if self.state is SenderState.SENDING else Role.DECODE)

    # --- pages -------------------------------------------------------------------------------------------------------

    def _granted(self, event: Granted, now: float) -> list[SenderAction]:
        try:
            self._plan.grant(event.grant)
        except ProtocolError as error:
            return self._fail(error.to_info(), Role.DECODE)
        self._granted_at = now
        self._repeats.stop()
        self.to(SenderState.SENDING)
        return self._advance(now)

    def _granted_again(self, event: Granted, now: float) -> list[SenderAction]:
        """A repetition is fine; other pages for the same fence are not."""
        if self._plan.matches(event.grant):
            return []
        return self._fail(ProtocolError("two different grants for one handoff").to_info(), Role.DECODE)

    def _computed(self, event: Computed, now: float) -> list[SenderAction]:
        self._plan.computed(event.pages, event.tokens)
        self._computed_at = now
        return self._advance(now)

    def _finished(self, event: Finished, now: float) -> list[SenderAction]:
        if not self._plan.all_computed:
            raise ValueError(f"{self.name}: finished before all {self._plan.tokens} tokens were computed")
        self._first_token = event.first_token
        return self._advance(now)

    def _written(self, event: BatchEnded, now: float) -> list[SenderAction]:
        self._count(event)
        if event.error is not None:
            # Unreachable is the receiver's fault; whatever else spoils a write is the writer's.
            unreachable = isinstance(event.error, (PeerUnreachable, ProtocolError))
            error = TransferFailed(event.error.message).to_info()
            return self._fail(error, Role.DECODE if unreachable else Role.PREFILL)
        return self._advance(now)

    def _stopped(self, event: BatchEnded, now: float) -> list[SenderAction]:
        self._count(event)
        return self._end_if_still()

    def _advance(self, now: float) -> list[SenderAction]:
        """Posts what can go out; when nothing is left, says DONE."""
        if self.state is not SenderState.SENDING:
            return []
        batch = self._plan.next_batch()
        if batch is not None:
            self._in_flight += 1
            self._batches += 1
            return [Post(batch)]
        if self._first_token is None or self._in_flight or not self._plan.complete:
            return []
        self._done_at = now
        self._repeats.start(now)
        self.to(SenderState.HOLDING)
        return [self._done()]

    def _count(self, event: BatchEnded) -> None:
        self._in_flight -= 1
        self._write_seconds += max(0.0, event.ended - max(event.started, self._written_until))
        self._written_until = max(self._written_until, event.ended)
        self._digests.update(enumerate(event.digests, event.batch.first))

    def _done(self) -> Send:
        assert self._first_token is not None
        digests = [self._digests[index] for index in sorted(self._digests)] if self._with_digests else []
        return Send(Done(self.fence, self._first_token, digests))

    # --- the end -----------------------------------------------------------------------------------------------------

    def _acked(self, event: Acked, now: float) -> list[SenderAction]:
        self.to(SenderState.ENDED)
        timings = HandoffTimings(
            grant_wait_seconds=self._granted_at - self._offered_at,
            write_seconds=self._write_seconds,
            exposed_seconds=now - self._computed_at,
            pages=self._plan.granted_pages,
            bytes=self._plan.granted_pages * self._page_bytes,
            tail_seconds=self._done_at - self._computed_at,
            skipped_pages=self._plan.skipped_pages,
            batches=self._batches,
        )
        return [Release(None, None, timings)]

    def _abort(self, event: AbortAsked, now: float) -> list[SenderAction]:
        return self._fail(event.error, event.blame)

    def _cancel(self, event: Cancelled, now: float) -> list[SenderAction]:
        return self._fail(event.error, None)

    def _fail(self, error: ErrorInfo, blame: Role | None) -> list[SenderAction]:
        self._outcome = (error, blame)
        self.to(SenderState.STOPPING)
        return self._end_if_still()

    def _end_if_still(self) -> list[SenderAction]:
        assert self._outcome is not None
        if self._in_flight:
            return []
        self.to(SenderState.ENDED)
        return [self._aborted(), Release(*self._outcome, None)]

    def _confirm(self, event: AbortAsked | Granted, now: float) -> list[SenderAction]:
        """As often as asked."""
        return [self._aborted()]

    def _aborted(self) -> Send:
        """After an ACK there was nothing to abort, and there is no error to tell."""
        error, blame = self._outcome or (ProtocolError("the handoff has ended well").to_info(), None)
        return Send(Aborted(self.fence, error, blame))

    def _ignore(self, event: object, now: float) -> list[SenderAction]:
        return []

    TABLE = {
        (SenderState.UNCONNECTED, PeerUp): "_offer",
        (SenderState.UNCONNECTED, PeerReplaced): "_replaced",
        (SenderState.UNCONNECTED, DeadlinePassed): "_too_late",
        (SenderState.UNCONNECTED, Computed): "_computed",
        (SenderState.UNCONNECTED, Finished): "_finished",
        (SenderState.UNCONNECTED, Cancelled): "_cancel",
        (SenderState.OFFERED, PeerUp): "_offer",
        (SenderState.OFFERED, PeerDown): "_wait_for_peer",
        (SenderState.OFFERED, PeerReplaced): "_replaced",
        (SenderState.OFFERED, DeadlinePassed): "_too_late",
        (SenderState.OFFERED, RepeatDue): "_repeat_offer",
        (SenderState.OFFERED, Granted): "_granted",
        (SenderState.OFFERED, Computed): "_computed",
        (SenderState.OFFERED, Finished): "_finished",
        (SenderState.OFFERED, AbortAsked): "_abort",
        (SenderState.OFFERED, Cancelled): "_cancel",
        (SenderState.SENDING, PeerUp): "_ignore",
        (SenderState.SENDING, PeerDown): "_lost",
        (SenderState.SENDING, PeerReplaced): "_replaced",
        (SenderState.SENDING, DeadlinePassed): "_too_late",
        (SenderState.SENDING, Granted): "_granted_again",
        (SenderState.SENDING, Computed): "_computed",
        (SenderState.SENDING, Finished): "_finished",
        (SenderState.SENDING, BatchEnded): "_written",
        (SenderState.SENDING, AbortAsked): "_abort",
        (SenderState.SENDING, Cancelled): "_cancel",
        (SenderState.HOLDING, PeerUp): "_done_again",
        (SenderState.HOLDING, PeerDown): "_wait_for_ack",
        (SenderState.HOLDING, PeerReplaced): "_replaced",
        (SenderState.HOLDING, DeadlinePassed): "_too_late",
        (SenderState.HOLDING, RepeatDue): "_repeat_done",
        (SenderState.HOLDING, Granted): "_ignore",
        (SenderState.HOLDING, Acked): "_acked",
        (SenderState.HOLDING, AbortAsked): "_abort",
        (SenderState.HOLDING, Cancelled): "_cancel",
        (SenderState.STOPPING, PeerUp): "_ignore",
        (SenderState.STOPPING, PeerDown): "_ignore",
        (SenderState.STOPPING, PeerReplaced): "_ignore",
        (SenderState.STOPPING, Granted): "_ignore",
        (SenderState.STOPPING, Computed): "_ignore",
        (SenderState.STOPPING, Finished): "_ignore",
        (SenderState.STOPPING, BatchEnded): "_stopped",
        (SenderState.STOPPING, AbortAsked): "_ignore",
        (SenderState.STOPPING, Cancelled): "_ignore",
        # Between the end and the caller's next `poll`:
        (SenderState.ENDED, Granted): "_confirm",
        (SenderState.ENDED, Computed): "_ignore",
        (SenderState.ENDED, Finished): "_ignore",
        (SenderState.ENDED, AbortAsked): "_confirm",
        (SenderState.ENDED, Cancelled): "_ignore",
    }

"""Whether and when a choice that has lost its attempt gets another one. Pure.

Attempts are bounded twice. In a row without progress, because what fails again and again in one place will do so once
more: a prompt that its engine dies of, a pair that can't hand over. And in all, because a request that brings down each
worker right after it got one step further must end, too. A token more than the attempt's first one is progress: the
first is prefill's own, and says nothing of the handoff and of decode. Progress forgives the failures before it, and
with them the wait: a long answer may outlive any number of workers. And a worker that falls silent, or is lost before
it has begun with the attempt, tells nothing against the request (`innocent`): such failures count in all only.

The first failure in a row is answered at once: workers die alone, and the others are fine. To find no live worker is no
failure: all of a pool may be restarting. It costs no attempt, only time, which the request's own deadline bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from cluster.config import Recovery
from cluster.errors import (
    AttemptsExhausted,
    BatonError,
    Draining,
    ProtocolError,
    TransferFailed,
    WorkerLost,
    WorkerSilent,
    WorkerStalled,
)
from cluster.messages import FinishReason, Sampling

DEFAULT_RECOVERY = Recovery()


class Interruption(str, Enum):
    """What ended an attempt before its request was done."""

    RETRACTED = "retracted"
    STALLED = "stalled"
    WORKER_LOST = "worker_lost"
    TRANSFER_FAILED = "transfer_failed"
    DRAINED = "drained"
    PROTOCOL_ERROR = "protocol_error"
    OTHER = "other"


_KINDS: tuple[tuple[type[BatonError], Interruption], ...] = (
    (WorkerStalled, Interruption.STALLED),
    (WorkerLost, Interruption.WORKER_LOST),
    (TransferFailed, Interruption.TRANSFER_FAILED),
    (Draining, Interruption.DRAINED),
    (ProtocolError, Interruption.PROTOCOL_ERROR),
)
"""The first that fits."""


def interruption(error: BatonError) -> Interruption:
    """The few words for an error that ended an attempt."""
    return next((kind for error_type, kind in _KINDS if isinstance(error, error_type)), Interruption.OTHER)


def natural_end(output: Sequence[int], sampling: Sampling) -> FinishReason | None:
    """Why `output` is all that the request will have, if it is: a worker may die between its last token and its last
    word, and another attempt would give a token too many."""
    if output and output[-1] in sampling.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if len(output) >= sampling.max_tokens else None


def innocent(error: BatonError, *, begun: bool) -> bool:
    """Whether the request can't have caused `error`; `begun`: the leg to blame had begun to compute it."""
    return isinstance(error, WorkerSilent) or (isinstance(error, WorkerLost) and not begun)


class RetryBudget:
    """The attempts of one choice: how many more, and after what delay."""

    def __init__(self, limits: Recovery) -> None:
        self._limits = limits
        self._failures = 0
        self._in_a_row = 0
        self._suspicions = 0
        """Failures in a row that the request itself may have caused."""
        self._without_place = 0
        self._last: BatonError | None = None

    def failed(self, error: BatonError, *, innocent: bool = False) -> float | None:
        """An attempt has failed. Returns the seconds until the next one, or None: there is none."""
        self._last = error
        self._failures += 1
        self._in_a_row += 1
        self._suspicions += not innocent
        limits = self._limits
        spent = self._failures >= limits.max_attempts or self._suspicions >= limits.max_attempts_without_progress
        if spent or not error.retryable:
            return None
        return self._delay(self._in_a_row - 1) if self._in_a_row > 1 else 0.0

    def not_placed(self, error: BatonError) -> float:
        """There is no worker for the next attempt. Returns the seconds until the next look."""
        self._last = error
        self._without_place += 1
        return self._delay(self._without_place)

    def placed(self) -> None:
        self._without_place = 0

    def progressed(self) -> None:
        self._in_a_row = self._suspicions = 0

    def verdict(self) -> BatonError:
        """Why there is no further attempt, once `failed` has said so."""
        assert self._last is not None
        if not self._last.retryable:
            return self._last
        return AttemptsExhausted(self.story())

    def story(self) -> str:
        """What has gone wrong so far; "" if nothing has."""
        if self._last is None:
            return ""
        failures = f"{self._failures} attempt{'' if self._failures == 1 else 's'} failed"
        return f"{failures}; the last word was {type(self._last).__name__}: {self._last.message}"

    def _delay(self, number: int) -> float:
        """The delay number 1, 2, ...; the exponent is bounded, for it would overflow in a long wait."""
        doubled: float = self._limits.first_delay_seconds * 2.0 ** min(number - 1, 32)
        return min(doubled, self._limits.longest_delay_seconds)

"""How long clients waited because of a fault: from the fault to the next token. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tests.fault.campaign import Strike
from tests.fault.plan import Kind
from tests.fault.reading import Reading
from tests.fault.watch import ChoiceRecord, RequestRecord

LATE_SECONDS = 20.0
"""An attempt that ended so long after a fault did not end because of it."""


class Delay(NamedTuple):
    """What one choice of one request noticed of a fault. Seconds."""

    kind: Kind
    total: float
    """From the fault to the choice's next token at its client."""
    prefill: float
    """Of it, from the last placement of the request to that token: queue, prefill, and the way of the token. 0 where
    no record tells."""


def delays(reading: Reading, record: RequestRecord | None, strikes: Sequence[Strike]) -> list[Delay]:
    """Of a request that has ended; empty if no fault interrupted it."""
    found = _of_the_router(reading, strikes)
    for choice, arrivals in zip(record.choices if record else (), reading.arrivals, strict=False):
        found += _of_workers(reading, choice, arrivals, strikes)
    return found


def _of_the_router(reading: Reading, strikes: Sequence[Strike]) -> list[Delay]:
    kills = [each.at for each in strikes if each.fault.kind is Kind.KILL_ROUTER]
    during = [at for at in kills if reading.sent_at <= at < (reading.ended_at or at)]
    nexts = [_next_arrival(arrivals, at) for at in during for arrivals in reading.arrivals]
    return [Delay(Kind.KILL_ROUTER, after, 0.0) for after in nexts if after is not None]


def _next_arrival(arrivals: Sequence[float], at: float) -> float | None:
    place = bisect_right(arrivals, at)
    return arrivals[place] - at if place < len(arrivals) else None


def _of_workers(
    reading: Reading, choice: ChoiceRecord, arrivals: Sequence[float], strikes: Sequence[Strike]
) -> list[Delay]:
    """One for each fault, however many attempts it took. Records of a router that came later tell nothing of before, or
    count again what the client had: tokens are counted from the last, and those from before the fault don't count."""
    found: dict[float, Delay] = {}
    got = len(arrivals) - sum(attempt.tokens for attempt in choice.history)
    for attempt, after in zip(choice.history, choice.history[1:], strict=False):
        got += attempt.tokens
        assert attempt.ended_seconds is not None
        workers = {attempt.prefill_worker, attempt.decode_worker}
        strike = _cause(strikes, workers, reading.sent_at + attempt.ended_seconds)
        if strike is None:
            continue
        place = max(got, bisect_right(arrivals, strike.at))
        if place < len(arrivals):
            total = arrivals[place] - strike.at
            prefill = arrivals[place] - reading.sent_at - after.placed_seconds
            found[strike.at] = Delay(strike.fault.kind, total, prefill)
    return list(found.values())


def _cause(strikes: Sequence[Strike], workers: set[str | None], ended: float) -> Strike | None:
    """The last fault of one of these workers before an attempt ended."""
    before = [each for each in strikes if each.victim in workers and each.at <= ended < each.at + LATE_SECONDS]
    return max(before, key=lambda strike: strike.at, default=None)


def by_kind(found: Sequence[Delay]) -> Mapping[Kind, list[Delay]]:
    """Only kinds that somebody noticed."""
    return {kind: each for kind in Kind if (each := [delay for delay in found if delay.kind is kind])}

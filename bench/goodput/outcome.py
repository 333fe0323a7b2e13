"""What one rate gave: from the requests' timelines to figures, and the objective that they are held against. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from bench.client import Timeline
from bench.standstill import Standstills
from bench.statistics import percentile


class Objective(msgspec.Struct, frozen=True):
    """A request is good if its first token and each further one came in time; a rate, if enough of its requests are."""

    first_token_seconds: float = 4.0
    gap_seconds: float = 0.080
    share: float = 0.9

    @property
    def description(self) -> str:
        return (
            f"{self.share:.0%} of requests with TTFT ≤ {self.first_token_seconds:g} s "
            f"and every gap ≤ {self.gap_seconds * 1e3:g} ms"
        )

    def good(self, timeline: Timeline) -> bool:
        """A request that failed, or was not answered to its end, is not."""
        first = timeline.first_token_seconds
        complete = timeline.error is None and timeline.finish_reason is not None
        in_time = first is not None and first <= self.first_token_seconds
        return complete and in_time and timeline.longest_gap_seconds <= self.gap_seconds

    def good_share(self, timelines: Sequence[Timeline]) -> float:
        return sum(self.good(line) for line in timelines) / len(timelines) if timelines else 1.0


class Outcome(msgspec.Struct, frozen=True):
    """One rate. Percentiles are over all requests (TTFT) and over all gaps of all requests; None without any."""

    rate: float
    """Requests a second, as intended."""
    requests: int
    good_share: float
    ttft_p50_seconds: float | None
    ttft_p90_seconds: float | None
    gap_p50_seconds: float | None
    gap_p99_seconds: float | None
    worst_gap_p90_seconds: float | None
    """Of the longest gap of each request: what the objective looks at."""
    tokens_per_second: float
    """Prompts and outputs of complete requests, until the last one ended."""
    errors: list[str]
    unanswered: int
    """Requests that were given up when the trial ended."""
    others_share: float | None = None
    """Of the cores' time, what went to processes that take no part."""
    running_good_share: float | None = None
    """By a clock that stands still with the machine; None where nobody can tell when it did."""
    standstill_longest_seconds: float | None = None

    @property
    def fair_share(self) -> float:
        """Of good requests, less what was the machine's fault where that is known."""
        return self.good_share if self.running_good_share is None else self.running_good_share


def judge(
    rate: float,
    timelines: Sequence[Timeline],
    ended_at: float,
    objective: Objective,
    others_share: float | None = None,
    standstills: Standstills | None = None,
) -> Outcome:
    """`ended_at` is when the last request was answered or given up; where no token had come, the wait until then
    stands for the TTFT, which it is a lower bound of."""
    waits = [ended_at - line.sent_at if (first := line.first_token_seconds) is None else first for line in timelines]
    gaps = [later - earlier for line in timelines for earlier, later in pairwise(line.arrivals)]
    complete = [line for line in timelines if line.finish_reason is not None]
    tokens = sum(line.prompt_tokens + line.tokens for line in complete)
    begun = min((line.sent_at for line in timelines), default=ended_at)
    return Outcome(
        rate=rate,
        requests=len(timelines),
        good_share=objective.good_share(timelines),
        running_good_share=(
            None if standstills is None else objective.good_share([line.by(standstills.running) for line in timelines])
        ),
        ttft_p50_seconds=_percentile(waits, 50),
        ttft_p90_seconds=_percentile(waits, 90),
        gap_p50_seconds=_percentile(gaps, 50),
        gap_p99_seconds=_percentile(gaps, 99),
        worst_gap_p90_seconds=_percentile([line.longest_gap_seconds for line in timelines if line.arrivals], 90),
        tokens_per_second=tokens / (ended_at - begun) if tokens else 0.0,
        errors=[line.error for line in timelines if line.error is not None],
        unanswered=sum(line.ended_at is None for line in timelines),
        others_share=others_share,
        standstill_longest_seconds=None if standstills is None else standstills.longest,
    )


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return percentile(values, percent) if values else None

"""From what clients saw, the router recorded and the processes used, to the figures of one measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from bench.load import LONG, SHORT, Observed
from bench.records import Record
from bench.standstill import Standstills
from bench.statistics import Spread, percentile

_MILLI = 1e3
_GIGA = 1e9
_MEGA = 1e6


class Figure(NamedTuple):
    """A row of the tables."""

    key: str
    label: str
    unit: str
    lower_is_better: bool


FIGURES = (
    Figure("ttft_p50", "TTFT, p50", "ms", True),
    Figure("ttft_short_p50", "TTFT of short prompts, p50", "ms", True),
    Figure("ttft_short_p99", "TTFT of short prompts, p99", "ms", True),
    Figure("ttft_long_p50", "TTFT of long prompts, p50", "ms", True),
    Figure("ttft_long_p99", "TTFT of long prompts, p99", "ms", True),
    Figure("second_token_p50", "first to second token, p50", "ms", True),
    Figure("second_token_p99", "first to second token, p99", "ms", True),
    Figure("inter_token_p50", "inter-token of steady streams, p50", "ms", True),
    Figure("inter_token_p99", "inter-token of steady streams, p99", "ms", True),
    Figure("inter_token_p99_over_p50", "inter-token of steady streams, p99 / p50", "", True),
    Figure("running_inter_token_p50", "inter-token while the machine ran, p50", "ms", True),
    Figure("running_inter_token_p99", "inter-token while the machine ran, p99", "ms", True),
    Figure("running_inter_token_p99_over_p50", "inter-token while the machine ran, p99 / p50", "", True),
    Figure("standstill_longest", "machine stood still, longest", "ms", True),
    Figure("standstill_share", "machine stood still, share of the time", "%", True),
    Figure("output_tokens_per_second", "output", "tok/s", False),
    Figure("total_tokens_per_second", "prompts and output", "tok/s", False),
    Figure("prefill_tokens_per_second", "prefill of a long prompt, p50", "tok/s", False),
    Figure("handoff_gigabytes_per_second", "handoff of a long prompt, p50", "GB/s", False),
    Figure("handoff_megabytes", "handoff of a long prompt, size", "MB", True),
    Figure("handoff_exposed_p50", "handoff, last chunk computed to ACK, p50", "ms", True),
    Figure("cpu_per_thousand_tokens", "CPU per 1,000 output tokens, all processes", "s", True),
)


class Measurement(msgspec.Struct, frozen=True):
    """One run of a workload. A figure that nothing was measured for is not in `figures`."""

    figures: dict[str, float]
    """By `Figure.key`, in its unit."""
    cpu_per_thousand_tokens: dict[str, float]
    """CPU seconds of each process in the window, per 1,000 tokens put out in it."""
    short_requests: int
    long_requests: int
    errors: list[str]
    others_share: float | None = None
    """Of the cores' time in the window, what went to processes that take no part; None if it was not looked at."""


class HandoffShape(NamedTuple):
    """Of a typical handoff: what a plain copy has to move to be compared with it."""

    page_bytes: int
    pages: int


def measure(
    observed: Observed,
    records: Sequence[Record],
    cpu_seconds: Mapping[str, float],
    others_share: float | None = None,
    standstills: Standstills | None = None,
) -> Measurement:
    """`records` are of the long requests; `cpu_seconds` are those spent in the window, by process."""
    tokens = sum(line.tokens_between(observed.start, observed.end) for line in observed.timelines)
    per_thousand = {name: seconds / tokens * 1e3 for name, seconds in cpu_seconds.items()} if tokens else {}
    figures = _client_figures(observed, tokens) | _record_figures(records)
    if standstills is not None:
        figures |= _running_figures(observed, standstills)
    if per_thousand:
        figures["cpu_per_thousand_tokens"] = sum(per_thousand.values())
    return Measurement(
        figures=figures,
        cpu_per_thousand_tokens=per_thousand,
        short_requests=len(observed.sent(SHORT)),
        long_requests=len(observed.sent(LONG)),
        errors=observed.errors,
        others_share=others_share,
    )


def typical_handoff(records: Sequence[Record]) -> HandoffShape | None:
    """The median one's; None if nothing was handed over."""
    handoffs = sorted((record.handoff for record in records if record.handoff), key=lambda each: each.pages)
    if not handoffs or not handoffs[len(handoffs) // 2].pages:
        return None
    middle = handoffs[len(handoffs) // 2]
    return HandoffShape(middle.bytes // middle.pages, middle.pages)


def _client_figures(observed: Observed, tokens: int) -> dict[str, float]:
    figures = {
        "output_tokens_per_second": tokens / observed.seconds,
        "total_tokens_per_second": (tokens + observed.prompt_tokens) / observed.seconds,
    }
    short, long = _waits(observed, SHORT), _waits(observed, LONG)
    figures |= _latency("ttft_short", short) | _latency("ttft_long", long)
    if short or long:
        figures["ttft_p50"] = percentile(short + long, 50) * _MILLI
    seconds = [
        gap for line in observed.timelines for gap in line.gaps_between(observed.start, observed.end, first=True)
    ]
    figures |= _latency("second_token", seconds)
    return figures | _gap_figures("inter_token", observed)


def _gap_figures(key: str, observed: Observed) -> dict[str, float]:
    """Of the steady streams."""
    steady = [line for line in observed.timelines if line.stream == SHORT]
    gaps = [gap for line in steady for gap in line.gaps_between(observed.start, observed.end)]
    ratio = {f"{key}_p99_over_p50": percentile(gaps, 99) / percentile(gaps, 50)} if gaps else {}
    return _latency(key, gaps) | ratio


def _running_figures(observed: Observed, standstills: Standstills) -> dict[str, float]:
    """By the clock that stands still with the machine; and how much that was."""
    lost = standstills.within(observed.start, observed.end)
    return _gap_figures("running_inter_token", observed.by(standstills.running)) | {
        "standstill_longest": max(lost, default=0.0) * _MILLI,
        "standstill_share": sum(lost) / observed.seconds * 100,
    }


def _waits(observed: Observed, stream: str) -> list[float]:
    """Seconds to the first token of each request of `stream` that was sent in the window and got one."""
    waits = [line.first_token_seconds for line in observed.sent(stream)]
    return [wait for wait in waits if wait is not None]


def _latency(key: str, seconds: Sequence[float]) -> dict[str, float]:
    spread = Spread.of(seconds)
    return {} if spread is None else {f"{key}_p50": spread.p50 * _MILLI, f"{key}_p99": spread.p99 * _MILLI}


def _record_figures(records: Sequence[Record]) -> dict[str, float]:
    prefills = [record.prefilled for record in records if record.prefilled is not None]
    handoffs = [record.handoff for record in records if record.handoff is not None]
    series = {
        "prefill_tokens_per_second": [
            (each.tokens - each.cached_tokens) / each.compute_seconds for each in prefills if each.compute_seconds
        ],
        "handoff_gigabytes_per_second": [
            each.bytes / each.write_seconds / _GIGA for each in handoffs if each.write_seconds
        ],
        "handoff_megabytes": [each.bytes / _MEGA for each in handoffs],
        "handoff_exposed_p50": [each.exposed_seconds * _MILLI for each in handoffs],
    }
    return {key: percentile(values, 50) for key, values in series.items() if values}

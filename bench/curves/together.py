"""Of what a batch's clients saw, the part in which all of it was decoding. Pure."""

from __future__ import annotations

from statistics import mean

import msgspec

from bench.client import Timeline
from bench.statistics import percentile


class Together(msgspec.Struct, frozen=True):
    """What a batch gave while all of it was decoding."""

    gap_seconds: float
    """The time over the tokens that came in it, of the median sequence. Single gaps say less: a client that is late
    once sees several tokens at once."""
    context_tokens: float
    """The mean over its sequences and its time."""


def while_all_decode(timelines: list[Timeline]) -> Together | None:
    """Of the time from the last sequence's first token to the first sequence's last one; None if a sequence has fewer
    than two tokens in it."""
    if not timelines or not all(line.arrivals for line in timelines):
        return None
    start = max(line.arrivals[0] for line in timelines)
    end = min(line.arrivals[-1] for line in timelines)
    gaps, contexts = [], []
    for line in timelines:
        within = [(at, count) for at, count in zip(line.arrivals, line.counts, strict=True) if start <= at <= end]
        if len(within) < 2:
            return None
        tokens = sum(count for _, count in within[1:])
        gaps.append((within[-1][0] - within[0][0]) / tokens)
        contexts.append(line.prompt_tokens + line.tokens_between(0.0, start) + (1 + tokens) / 2)
    return Together(percentile(gaps, 50), mean(contexts))

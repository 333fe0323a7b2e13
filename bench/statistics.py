"""Percentiles and medians, as every table of ours means them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

import msgspec

DEFINITION = (
    "pN is the value at rank N/100 x (count - 1) of the sorted values, linear between neighbours "
    "(Hyndman and Fan, type 7: numpy's default)"
)


def percentile(values: Sequence[float], percent: float) -> float:
    """See `DEFINITION`. Raises `ValueError` for no values, or a percent outside 0..100."""
    if not values:
        raise ValueError("no values, no percentile")
    if not 0 <= percent <= 100:
        raise ValueError(f"{percent} is no percentage")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


class Spread(msgspec.Struct, frozen=True):
    """A distribution in three figures, in the unit of its values."""

    count: int
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None for no values: nothing was measured, which is not the same as zero."""
        return cls(len(values), percentile(values, 50), percentile(values, 99)) if values else None


class Repeated(msgspec.Struct, frozen=True):
    """One figure over the rounds of a run."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Repeated | None:
        """None for no values."""
        return cls.over(values) if values else None

    @classmethod
    def over(cls, values: Sequence[float]) -> Repeated:
        """Raises `ValueError` for no values."""
        return cls(median(values), min(values), max(values))


def repeated(rounds: Sequence[Mapping[str, float]], keys: Sequence[str]) -> dict[str, Repeated]:
    """Each of these figures over the rounds that have it; without those that none has."""
    found = {key: Repeated.of([one[key] for one in rounds if key in one]) for key in keys}
    return {key: figure for key, figure in found.items() if figure is not None}

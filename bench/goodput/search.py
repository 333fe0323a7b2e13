"""Which rate to try next, and what was found: a grid upwards, then bisection. Pure."""

from __future__ import annotations

from math import sqrt

LOWEST_RATE = 0.05
HIGHEST_RATE = 1000.0
"""Requests a second; beyond these nothing is searched."""


class RateSearch:
    """Looks for the highest rate that passes. `factor` is between two rates of the grid; each of the `halvings` takes
    the square root of the factor between what passed and what failed.

    Ask `next_rate`, try that, tell `note`; until `next_rate` is None.
    """

    def __init__(self, start: float, factor: float = 1.5, halvings: int = 3) -> None:
        if start <= 0 or factor <= 1:
            raise ValueError(f"a search from {start} by {factor} leads nowhere")
        self._start = start
        self._factor = factor
        self._halvings = halvings
        self._passed: float | None = None
        self._failed: float | None = None

    @property
    def found(self) -> float:
        """The highest rate that has passed; 0 if none has."""
        return self._passed or 0.0

    @property
    def next_rate(self) -> float | None:
        if self._passed is None and self._failed is None:
            return self._start
        if self._failed is None:
            assert self._passed is not None
            rate = self._passed * self._factor
            return rate if rate <= HIGHEST_RATE else None
        if self._passed is None:
            rate = self._failed / self._factor
            return rate if rate >= LOWEST_RATE else None
        return sqrt(self._passed * self._failed) if self._halvings else None

    def note(self, rate: float, *, passed: bool) -> None:
        """The outcome of `next_rate`."""
        if self._passed is not None and self._failed is not None:
            self._halvings -= 1
        if passed:
            self._passed = rate
        else:
            self._failed = rate

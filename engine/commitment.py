"""For how many tokens of output a sequence gets pages when it enters: as many as answers of late have needed. Pure.

A limit (max_tokens) says little about an answer's length, and pages kept for what never comes keep others out. So the
lengths of recent answers decide, by the product-limit estimator (Kaplan and Meier, 1958): an answer that was cut off,
by its limit or because it was interrupted, tells that it is longer than that, and no more. Where all are cut off, the
estimate is the limit.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import deque

from engine.sequence import Sequence

REMEMBERED = 256
"""Recent answers that count."""
ENOUGH = 16
"""With fewer answers that are longer than the one in question, they tell nothing."""
UNKNOWN = 512
"""Tokens to come that are assumed then."""
MARGIN = 1.25
"""On what is still to come."""
LEAST = 32
"""Tokens to come, at least: so many steps that an entry was worth it."""


class Commitments:
    """Learns from the sequences that leave (`ended`) for those that enter (`capacity`)."""

    def __init__(self, quantile: float) -> None:
        """`quantile`: the share of answers that shall stay within their estimate; 1: there is no estimate."""
        self._quantile = quantile
        self._recent: deque[tuple[int, bool]] = deque()
        self._lengths: list[tuple[int, bool]] = []
        """The recent ones, sorted: (tokens, whether it was cut off)."""

    def ended(self, tokens: int, *, cut_off: bool) -> None:
        """An output had `tokens` tokens when its sequence left, and would have had more if it was `cut_off`."""
        if not tokens:
            return
        if len(self._recent) == REMEMBERED:
            self._lengths.remove(self._recent.popleft())
        self._recent.append((tokens, cut_off))
        insort(self._lengths, (tokens, cut_off))

    def capacity(self, sequence: Sequence) -> int:
        """Tokens whose KV it gets pages for: at least `LEAST` more than it has, at most all that it can ever need.

        Each interruption doubles what it gets, so that it is soon given all, and then it is not interrupted any more:
        the number of its interruptions is bounded by the logarithm of its limit.
        """
        produced = len(sequence.output)
        to_come = self._to_come(produced)
        if to_come is None:
            return sequence.capacity
        generous = max(LEAST, math.ceil(to_come * MARGIN)) << min(sequence.attempt - 1, 32)
        return min(sequence.capacity, sequence.length + generous)

    def _to_come(self, produced: int) -> int | None:
        """Tokens after those `produced`; None if no answer of late tells an end."""
        if self._quantile >= 1:
            return None
        longer = [entry for entry in self._lengths if entry[0] > produced]
        if len(longer) < ENOUGH:
            return UNKNOWN
        lasting = 1.0
        for place, (tokens, cut_off) in enumerate(longer):
            if not cut_off:
                lasting *= 1 - 1 / (len(longer) - place)
            if lasting <= 1 - self._quantile:
                return tokens - produced
        return None

"""How much of a step belongs to prompts, and when new prompts may begin, on a worker that decodes too. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from engine.sequence import Sequence

LEAST_CHUNK = 16
"""Prompt tokens of a step beside decodes, however conservative: about as many as hardly show in a step's time."""


class Pacing:
    """Decodes go first: a step has all of them, and prompts take the rest of it."""

    def __init__(
        self, chunk_tokens: int, conservativeness: float = 0.0, delay_seconds: float = 0.0, *, fill: bool = True
    ) -> None:
        """`conservativeness` from 0 to 1, see `budget`; `delay_seconds`, see `holds_back`; `fill`, see `share`."""
        least = min(LEAST_CHUNK, chunk_tokens)
        self._chunk_tokens = chunk_tokens
        self._beside_decodes = round(chunk_tokens * (least / chunk_tokens) ** conservativeness)
        self._delay_seconds = delay_seconds
        self._fill = fill

    def budget(self, decodes: int) -> int:
        """Prompt tokens of a step with so many decodes.

        Without a decode, `chunk_tokens`; else chunk_tokens * (LEAST_CHUNK / chunk_tokens) ** conservativeness: at 0 the
        whole chunk, at 1 `LEAST_CHUNK`, and each tenth on the way shortens the step by the same factor.
        """
        return self._beside_decodes if decodes else self._chunk_tokens

    def share(self, pending: Iterable[int], decodes: int) -> list[int]:
        """How many of its `pending` tokens each prompt gets in a step with so many decodes: the first ones all, as far
        as the budget goes. Without `fill`, a step that completes a prompt takes no part of one that it doesn't."""
        budget = self.budget(decodes)
        counts: list[int] = []
        for tokens in pending:
            if not budget or (counts and tokens > budget and not self._fill):
                break
            counts.append(min(tokens, budget))
            budget -= counts[-1]
        return counts

    def holds_back(self, waiting: Iterable[Sequence], running: Iterable[Sequence], now: float) -> bool:
        """Whether those that wait for their first step are to wait for company, so that decodes are disturbed once for
        several prompts. Not if nothing decodes, if a prompt is being computed anyway, if together they fill a step's
        budget, or if one of them was interrupted or has waited for `delay_seconds`."""
        if not self._delay_seconds:
            return False
        pending = [sequence.pending for sequence in running]
        if not pending or max(pending) > 1:
            return False
        tokens = 0
        for sequence in waiting:
            tokens += sequence.pending
            due = sequence.interrupted or now - sequence.arrived >= self._delay_seconds
            if due or tokens >= self._beside_decodes:
                return False
        return True

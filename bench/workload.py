"""Named loads: what is asked of a cluster, when, and with which prompts. Pure: the same seed gives the same prompts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec

FIRST_PLAIN_TOKEN = 300
"""Special tokens and single bytes lie below this in the vocabularies we know; prompts are drawn from above it."""


class Steady(msgspec.Struct, frozen=True, kw_only=True):
    """Clients that read one answer after the other: each asks again as soon as its answer is complete."""

    streams: int
    prompt_tokens: int
    output_tokens: int

    def first_output_tokens(self, stream: int) -> int:
        """Length of a stream's first answer, other for each: else the streams would go on in step."""
        return max(1, self.output_tokens * (stream + 1) // self.streams)


class Arrivals(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that come at fixed times, whether earlier ones are answered or not."""

    period_seconds: float
    prompt_tokens: int
    output_tokens: int


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """Steady streams and, beside them, long prompts. Only what happens in the `seconds` after warm-up is measured."""

    name: str
    steady: Steady
    long: Arrivals | None
    warm_up_seconds: float
    seconds: float

    @property
    def description(self) -> str:
        text = f"{self.steady.streams} streams of {self.steady.prompt_tokens}-token prompts"
        if self.long is not None:
            text += f", a {self.long.prompt_tokens}-token prompt every {self.long.period_seconds:g} s"
        return f"{text}; {self.seconds:g} s after {self.warm_up_seconds:g} s of warm-up"


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "mixed": Workload(
            name="mixed",
            steady=Steady(streams=8, prompt_tokens=64, output_tokens=128),
            long=Arrivals(period_seconds=2.0, prompt_tokens=1500, output_tokens=16),
            warm_up_seconds=5.0,
            seconds=30.0,
        ),
        "decode": Workload(
            name="decode",
            steady=Steady(streams=8, prompt_tokens=64, output_tokens=128),
            long=None,
            warm_up_seconds=5.0,
            seconds=20.0,
        ),
        "brief": Workload(
            name="brief",
            steady=Steady(streams=2, prompt_tokens=16, output_tokens=16),
            long=Arrivals(period_seconds=1.0, prompt_tokens=200, output_tokens=4),
            warm_up_seconds=1.0,
            seconds=3.0,
        ),
    }
)
"""`mixed` is the comparison's; `decode` is without long prompts; `brief` only shows that all works."""


class Prompts:
    """Deterministic prompts of token ids. No two share a beginning, so that no cache helps anybody."""

    def __init__(self, seed: int, vocab_size: int, *, ids: Sequence[int] | None = None) -> None:
        """Of `ids`; by default of all plain tokens of the vocabulary."""
        if vocab_size <= FIRST_PLAIN_TOKEN:
            raise ValueError(f"a vocabulary of {vocab_size} tokens leaves none above {FIRST_PLAIN_TOKEN}")
        self._seed = seed
        self._ids = ids or range(FIRST_PLAIN_TOKEN, vocab_size)

    def prompt(self, stream: str, number: int, tokens: int) -> list[int]:
        """Prompt `number` of `stream`, `tokens` ids long, whatever was asked for before."""
        draw = random.Random(f"{self._seed}/{stream}/{number}")
        return [draw.choice(self._ids) for _ in range(tokens)]

"""The curves as others read them: typed, with units in the names, and with where they come from. Pure."""

from __future__ import annotations

import msgspec

from bench.machine import Setting
from bench.report import Page, Table, number, spread
from bench.statistics import Repeated

_MILLI = 1e3


class PrefillPoint(msgspec.Struct, frozen=True):
    """`prompts` prompts at once, each of `new_tokens` tokens to compute behind `cached_tokens` that are there."""

    new_tokens: int
    cached_tokens: int
    prompts: int
    first_token_seconds: Repeated
    """From sending them to the last one's first token, at the client: over the runs."""


class DecodePoint(msgspec.Struct, frozen=True):
    """`batch` sequences that decode together, each behind a prompt of `prompt_tokens`."""

    batch: int
    prompt_tokens: int
    context_tokens: int
    """What they had before them in the middle of the time that was measured, prompt and output, on average."""
    inter_token_seconds: Repeated
    """Time over tokens in each run, over the runs."""


class PrefillCurve(msgspec.Struct, frozen=True, tag_field="kind", tag="prefill-curve"):
    """One prefill worker alone. `topology` is the resolved one, as `baton validate` prints it."""

    setting: Setting
    topology: str
    model: str
    cores: list[int]
    """Of the worker; empty if it was not pinned."""
    repeats: int
    seed: int
    points: list[PrefillPoint]

    @property
    def page(self) -> Page:
        headers = ["new tokens", "cached before", "prompts", "first token, ms", "new tok/s"]
        rows = [
            [
                f"{point.new_tokens:,}",
                f"{point.cached_tokens:,}",
                str(point.prompts),
                spread(point.first_token_seconds, _MILLI),
                number(point.new_tokens * point.prompts / point.first_token_seconds.median),
            ]
            for point in self.points
        ]
        notes = [
            _runs(self.cores, self.repeats),
            "First token: after all prompts were sent, until each has one, at the client.",
        ]
        table = Table("Prefill", headers, rows)
        return Page("curve-prefill", f"One prefill worker alone, {self.model}", [table], notes)


class DecodeCurve(msgspec.Struct, frozen=True, tag_field="kind", tag="decode-curve"):
    """One decode worker alone; the rest as in `PrefillCurve`."""

    setting: Setting
    topology: str
    model: str
    cores: list[int]
    repeats: int
    seed: int
    points: list[DecodePoint]

    @property
    def page(self) -> Page:
        rows = [
            [
                str(point.batch),
                f"{point.prompt_tokens:,}",
                f"{point.context_tokens:,}",
                spread(point.inter_token_seconds, _MILLI),
                number(point.batch / point.inter_token_seconds.median),
            ]
            for point in self.points
        ]
        notes = [
            _runs(self.cores, self.repeats),
            "Only while all of a batch decodes; the context is that in the middle of this time.",
        ]
        table = Table("Decode", ["batch", "prompts", "context", "inter-token, ms", "tok/s"], rows)
        return Page("curve-decode", f"One decode worker alone, {self.model}", [table], notes)


def _runs(cores: list[int], repeats: int) -> str:
    where = f"on core {', '.join(map(str, cores))}" if cores else "on no core in particular"
    return f"The worker runs {where}. Medians of {repeats} runs (least to most) after one to warm up."

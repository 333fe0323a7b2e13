"""Requests of random sizes at random times: a Poisson process. Pure: the same seed gives the same requests."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import msgspec

DISTRIBUTION = "log-uniform: a length is as likely between n and 2n as between 2n and 4n"


class Lengths(msgspec.Struct, frozen=True):
    """Tokens, from `least` to `most`; see `DISTRIBUTION`."""

    least: int
    most: int

    def draw(self, source: random.Random) -> int:
        return round(self.least * math.pow(self.most / self.least, source.random()))


class Mix(msgspec.Struct, frozen=True):
    """What is asked for."""

    prompt: Lengths = Lengths(64, 2000)
    output: Lengths = Lengths(16, 200)

    @property
    def description(self) -> str:
        prompt, output = self.prompt, self.output
        return f"prompts of {prompt.least} to {prompt.most:,} tokens, outputs of {output.least} to {output.most:,}"


class Arrival(NamedTuple):
    """One request; `at` is in seconds from the beginning."""

    at: float
    prompt_tokens: int
    output_tokens: int


def draw_arrivals(mix: Mix, rate: float, seconds: float, seed: int, least: int = 0) -> list[Arrival]:
    """All that come within `seconds` at `rate` requests a second, or the first `least` if that is more. At twice the
    rate the same requests come, in the same order, in half the time: rates differ in nothing but their speed."""
    source = random.Random(f"{seed}/arrivals")
    found: list[Arrival] = []
    at = 0.0
    while True:
        at += source.expovariate(1.0) / rate
        arrival = Arrival(at, mix.prompt.draw(source), mix.output.draw(source))
        if at >= seconds and len(found) >= least:
            return found
        found.append(arrival)

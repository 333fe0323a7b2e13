"""Timing an engine from within its process: random prompts, and calls that are repeated."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from itertools import count, pairwise

from cluster.messages import Fence, Sampling
from engine.engine import Engine
from engine.model_config import ModelConfig
from engine.sequence import Sequence


class Prompts:
    """Random prompts under keys of their own."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._draw = random.Random(0)
        self._numbers = count()

    def sequence(self, tokens: int, max_tokens: int) -> Sequence:
        prompt = [self._draw.randrange(self._vocab_size) for _ in range(tokens)]
        key = Fence(f"measured-{next(self._numbers)}", 1, 0, 0)
        return Sequence(key, prompt, [], Sampling(max_tokens=max_tokens, seed=0, temperature=0.0))


def seconds_of_prefill(engine: Engine, prompts: Prompts, tokens: int, repeats: int) -> float:
    """Of a prompt of so many tokens, from its submission to its first token."""

    def prefill() -> None:
        sequence = prompts.sequence(tokens, 1)
        engine.submit(sequence)
        while engine.step():
            pass
        engine.release(sequence.key)

    return median_seconds(prefill, repeats)


def while_decoding(
    engine: Engine, prompts: Prompts, batch: int, context: int, most: int, measure: Callable[[], float]
) -> float:
    """What `measure` finds while so many sequences of `context` tokens decode, for at most `most` steps."""
    sequences = [prompts.sequence(context, most + 1) for _ in range(batch)]
    for sequence in sequences:
        engine.submit(sequence)
    while engine.queued_tokens:
        engine.step()
    found = measure()
    for sequence in sequences:
        engine.cancel(sequence.key)
    while engine.step():
        pass
    for sequence in sequences:
        engine.release(sequence.key)
    return found


def weights_per_token(config: ModelConfig) -> int:
    """Values of all layers' matrices."""
    attention = config.hidden_size * config.head_dim * 2 * (config.heads + config.kv_heads)
    return config.layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    return statistics.median(_times(call, repeats))


def least_seconds(call: Callable[[], object], repeats: int) -> float:
    """A peak is what was reached once."""
    return min(_times(call, repeats))


def _times(call: Callable[[], object], repeats: int) -> list[float]:
    """After one call that is not counted."""
    call()
    marks = [time.perf_counter()]
    for _ in range(repeats):
        call()
        marks.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(marks)]

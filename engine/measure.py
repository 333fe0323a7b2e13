"""`python -m engine.measure`: one engine's speed beside what the machine could do at best, as JSON.

Prefill is bounded by products: its floor is the model's multiplications at the highest rate that any product reaches
here. Decode of one sequence is bounded by reading: its floor is the weights' bytes at the rate of a plain sum over
memory. Both are of the same number of threads. Times are medians.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count, pairwise
from pathlib import Path

import msgspec
import torch

from cluster.config import Dtype, Kernels, WeightsFrom
from cluster.engine_speed import EngineSpeed
from cluster.messages import Fence, Sampling
from cluster.model_files import resolve_model
from engine.engine import Engine, EngineConfig
from engine.environment import engine_environment
from engine.linear import make_linear
from engine.model_config import ModelConfig
from engine.sequence import Sequence as EngineSequence
from engine.weights import open_model

REPEATS = 9
PROMPT_TOKENS = 512
CONTEXT_TOKENS = 256
DECODE_STEPS = 40
BATCHES = (1, 8, 32)
PEAK_SIDE = 2048
READ_BYTES = 1 << 30


def measure(model: Path, dtype: Dtype, threads: int, kernels: Kernels) -> EngineSpeed:
    """Takes about half a minute. Raises what `Engine` raises."""
    torch.set_num_threads(threads)
    architecture = open_model(model, WeightsFrom.FILES).config
    torch_dtype: torch.dtype = getattr(torch, dtype.value)
    peak, reading = _product_peak(torch_dtype), _read_peak()
    engine = Engine(
        EngineConfig(
            model_path=model, model_name="measured", dtype=dtype, page_size=16, pool_pages=1024,
            max_running=max(BATCHES), chunk_tokens=PROMPT_TOKENS, prefix_cache=False, threads=threads, kernels=kernels,
        )
    )  # fmt: skip
    engine.warm_up()
    prompts = _Prompts(architecture.vocab_size)
    prefill = _seconds_of_prefill(engine, prompts)
    decode = {batch: _seconds_of_step(engine, prompts, batch) for batch in BATCHES}
    weights = _weights_per_token(architecture)
    head = architecture.vocab_size * architecture.hidden_size
    flops = 2 * (weights * PROMPT_TOKENS + head)
    return EngineSpeed(
        dtype=dtype.value,
        threads=threads,
        kernels=engine.kernels.value,
        product_flops_per_second=peak,
        read_bytes_per_second=reading,
        prefill_tokens_per_second=PROMPT_TOKENS / prefill,
        prefill_share_of_peak=flops / peak / prefill,
        decode_tokens_per_second={batch: batch / seconds for batch, seconds in decode.items()},
        decode_share_of_reading=(weights + head) * torch_dtype.itemsize / reading / decode[1],
    )


class _Prompts:
    """Random prompts under keys of their own."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._draw = random.Random(0)
        self._numbers = count()

    def sequence(self, tokens: int, max_tokens: int) -> EngineSequence:
        prompt = [self._draw.randrange(self._vocab_size) for _ in range(tokens)]
        key = Fence(f"measured-{next(self._numbers)}", 1, 0, 0)
        return EngineSequence(key, prompt, [], Sampling(max_tokens=max_tokens, seed=0, temperature=0.0))


def _seconds_of_prefill(engine: Engine, prompts: _Prompts) -> float:
    def prefill() -> None:
        sequence = prompts.sequence(PROMPT_TOKENS, 1)
        engine.submit(sequence)
        while engine.step():
            pass
        engine.release(sequence.key)

    return _median_seconds(prefill, REPEATS)


def _seconds_of_step(engine: Engine, prompts: _Prompts, batch: int) -> float:
    """Of a decode step of so many sequences."""
    sequences = [prompts.sequence(CONTEXT_TOKENS, 2 * DECODE_STEPS) for _ in range(batch)]
    for sequence in sequences:
        engine.submit(sequence)
    while engine.queued_tokens:
        engine.step()
    seconds = _median_seconds(engine.step, DECODE_STEPS)
    for sequence in sequences:
        engine.cancel(sequence.key)
        engine.release(sequence.key)
    return seconds


def _product_peak(dtype: torch.dtype) -> float:
    """The better of a plain and a packed product."""
    left, right = torch.randn(2, PEAK_SIDE, PEAK_SIDE).to(dtype)
    packed = make_linear(right)
    with torch.inference_mode():
        seconds = min(_least_seconds(lambda: packed(left)), _least_seconds(lambda: left @ right))
    return 2 * PEAK_SIDE**3 / seconds


def _read_peak() -> float:
    memory = torch.ones(READ_BYTES // 4)
    return READ_BYTES / _least_seconds(lambda: memory.sum())


def _weights_per_token(config: ModelConfig) -> int:
    """Values of all layers' matrices."""
    attention = config.hidden_size * config.head_dim * 2 * (config.heads + config.kv_heads)
    return config.layers * (attention + 3 * config.hidden_size * config.intermediate_size)


def _times(call: Callable[[], object], repeats: int) -> list[float]:
    """After one call that is not counted."""
    call()
    marks = [time.perf_counter()]
    for _ in range(repeats):
        call()
        marks.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(marks)]


def _median_seconds(call: Callable[[], object], repeats: int) -> float:
    return statistics.median(_times(call, repeats))


def _least_seconds(call: Callable[[], object]) -> float:
    """A peak is what was reached once."""
    return min(_times(call, REPEATS))


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m engine.measure", description="One engine's speed, as JSON.")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", type=Dtype, default=Dtype.BFLOAT16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernels", type=Kernels, default=Kernels.AUTO)
    chosen = parser.parse_args(arguments)
    speed = measure(resolve_model(chosen.model), chosen.dtype, chosen.threads, chosen.kernels)
    print(msgspec.json.encode(speed).decode())


if __name__ == "__main__":
    # Threads wait as a worker's do; torch's OpenMP reads how when it is loaded.
    if unset := engine_environment():
        os.execve(sys.executable, [sys.executable, "-m", "engine.measure", *sys.argv[1:]], os.environ | unset)
    main(sys.argv[1:])

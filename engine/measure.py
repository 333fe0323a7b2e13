"""`python -m engine.measure`: one engine's speed beside what the machine could do at best, as JSON.

Prefill is bounded by products: its floor is the model's multiplications at the highest rate that any product reaches
here. Decode of one sequence is bounded by reading: its floor is the weights' bytes at the rate of a plain sum over
memory. Both are of the same number of threads. Times are medians.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from cluster.config import Dtype, Kernels, WeightsFrom
from cluster.engine_speed import EngineSpeed
from cluster.model_files import resolve_model
from engine.engine import Engine, EngineConfig
from engine.environment import engine_environment
from engine.linear import make_linear
from engine.timing import Prompts, least_seconds, median_seconds, seconds_of_prefill, weights_per_token, while_decoding
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
    prompts = Prompts(architecture.vocab_size)
    prefill = seconds_of_prefill(engine, prompts, PROMPT_TOKENS, REPEATS)
    decode = {batch: _seconds_of_step(engine, prompts, batch) for batch in BATCHES}
    weights = weights_per_token(architecture)
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


def _seconds_of_step(engine: Engine, prompts: Prompts, batch: int) -> float:
    """Of a decode step of so many sequences."""

    def steps() -> float:
        return median_seconds(engine.step, DECODE_STEPS)

    return while_decoding(engine, prompts, batch, CONTEXT_TOKENS, 2 * DECODE_STEPS, steps)


def _product_peak(dtype: torch.dtype) -> float:
    """The better of a plain and a packed product."""
    left, right = torch.randn(2, PEAK_SIDE, PEAK_SIDE).to(dtype)
    packed = make_linear(right)
    with torch.inference_mode():
        seconds = min(least_seconds(lambda: packed(left), REPEATS), least_seconds(lambda: left @ right, REPEATS))
    return 2 * PEAK_SIDE**3 / seconds


def _read_peak() -> float:
    memory = torch.ones(READ_BYTES // 4)
    return READ_BYTES / least_seconds(lambda: memory.sum(), REPEATS)


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

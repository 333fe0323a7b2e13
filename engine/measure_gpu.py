"""`python -m engine.measure_gpu`: an engine's steps on a GPU beside what bounds them, as JSON.

A decode step reads all weights, and the KV of its sequences: its floor is that at the speed of a copy. A prompt's floor
is its arithmetic at the rate of a large product. Both are measured on the same device before. Times are medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence

import msgspec
import torch

from cluster.config import Device, Dtype, Switch, WeightsFrom
from cluster.gpu_speed import DecodePoint, GpuSpeed, PrefillPoint
from cluster.messages import ModelCard
from cluster.model_files import resolve_model
from engine.device_memory import full_is_refused
from engine.engine import Engine, EngineConfig
from engine.model_config import ModelConfig
from engine.timing import Prompts, least_seconds, median_seconds, seconds_of_prefill, weights_per_token, while_decoding
from engine.weights import open_model

NO_GPU = "no GPU: torch finds no CUDA device on this machine"
PAGE_TOKENS = 16
STEPS = 60
TRACED_STEPS = 30
PREFILLS = 3
PEAK_REPEATS = 10


class Scale(msgspec.Struct, frozen=True):
    """What is measured, and how large the yardsticks are."""

    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    context: int
    """Of each sequence that decodes."""
    chunk_tokens: int
    copy_bytes: int = 4 << 30
    product_side: int = 8192


def measure(config: EngineConfig, scale: Scale) -> GpuSpeed:
    """Raises what `Engine` raises. Prompts that exceed the model's context are left out."""
    device = torch.device(config.device.value)
    dtype: torch.dtype = getattr(torch, config.dtype.value)
    copied, rate = _copy_rate(device, scale.copy_bytes), _product_rate(device, dtype, scale.product_side)
    with full_is_refused():
        engine = Engine(config)
        engine.warm_up()
        architecture = open_model(config.model_path, config.weights).config
        prompts = Prompts(architecture.vocab_size)
        fitting = [tokens for tokens in scale.prompts if _fits(engine.model, tokens, 1)]
        return GpuSpeed(
            model=config.model_name,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            dtype=config.dtype.value,
            chunk_tokens=scale.chunk_tokens,
            copied_bytes_per_second=copied,
            operations_per_second=rate,
            decode=[_decode(engine, architecture, prompts, batch, scale.context, dtype) for batch in scale.batches],
            prefill=[
                PrefillPoint(
                    tokens, seconds_of_prefill(engine, prompts, tokens, PREFILLS), operations(architecture, tokens)
                )
                for tokens in fitting
            ],
        )


def engine_config(model: str, weights: WeightsFrom, device: Device, dtype: Dtype, scale: Scale) -> EngineConfig:
    """With a pool for the largest of what is measured."""
    largest = max(*scale.prompts, max(scale.batches) * (scale.context + STEPS + TRACED_STEPS + PAGE_TOKENS))
    return EngineConfig(
        model_path=resolve_model(model),
        model_name=model.rstrip("/").rsplit("/", 1)[-1],
        dtype=dtype,
        weights=weights,
        page_size=PAGE_TOKENS,
        pool_pages=-(-2 * largest // PAGE_TOKENS),
        max_running=max(scale.batches),
        chunk_tokens=scale.chunk_tokens,
        prefix_cache=False,
        device=device,
        graphs=Switch.AUTO if device is Device.CUDA else Switch.NEVER,
        ahead=Switch.AUTO,
    )


def operations(config: ModelConfig, tokens: int) -> float:
    """Additions and multiplications of a prompt: products of each token, the head's of the last one, and attention, in
    which a token sees half of the prompt on average."""
    attention = 2 * config.layers * config.heads * config.head_dim * tokens**2
    return 2.0 * (weights_per_token(config) * tokens + config.vocab_size * config.hidden_size) + attention


def read_bytes(config: ModelConfig, tokens: int, item: int, kv_item: int) -> int:
    """Of a decode step: the layers' matrices, the head, and the KV of so many tokens."""
    weights = weights_per_token(config) + config.vocab_size * config.hidden_size
    return item * weights + kv_item * 2 * config.layers * config.kv_heads * config.head_dim * tokens


def idle_share(busy: Iterable[tuple[float, float]]) -> float | None:
    """Of the time from the first beginning to the last end, what none of these spans covers; they may overlap."""
    spans = sorted(busy)
    if not spans:
        return None
    covered, reached = 0.0, spans[0][0]
    for begin, end in spans:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    whole = reached - spans[0][0]
    return 1 - covered / whole if whole else None


def _decode(
    engine: Engine, config: ModelConfig, prompts: Prompts, batch: int, context: int, dtype: torch.dtype
) -> DecodePoint:
    idle: list[float | None] = []

    def steps() -> float:
        seconds = median_seconds(engine.step, STEPS)
        idle.append(_idle_share_of(engine.step))
        return seconds

    most = STEPS + TRACED_STEPS + 1
    seconds = while_decoding(engine, prompts, batch, context, most, steps)
    middle = context + most // 2
    kv_item = engine.page_bytes // (2 * config.layers * config.kv_heads * config.head_dim * PAGE_TOKENS)
    return DecodePoint(batch, middle, seconds, read_bytes(config, batch * middle, dtype.itemsize, kv_item), idle[0])


def _idle_share_of(step: Callable[[], object]) -> float | None:
    """While step follows step. None on a CPU."""
    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        for _ in range(TRACED_STEPS):
            step()
        torch.cuda.synchronize()
    on_device = [event for event in recorded.events() if event.device_type.name == "CUDA"]
    return idle_share((event.time_range.start, event.time_range.end) for event in on_device)


def _copy_rate(device: torch.device, size: int) -> float:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / least_seconds(lambda: _wait(target.copy_(source)), PEAK_REPEATS)


def _product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    with torch.inference_mode():
        return 2 * side**3 / least_seconds(lambda: _wait(left @ right), PEAK_REPEATS)


def _wait(computed: torch.Tensor) -> None:
    if computed.device.type == "cuda":
        torch.cuda.synchronize(computed.device)


def _fits(model: ModelCard, prompt: int, tokens: int) -> bool:
    return prompt + tokens <= model.context_length


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status; 2: there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m engine.measure_gpu", description="An engine's speed on a GPU.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=WeightsFrom, default=WeightsFrom.FILES)
    parser.add_argument("--dtype", type=Dtype, default=Dtype.BFLOAT16)
    parser.add_argument("--scale", required=True, help="a Scale, as JSON")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    scale = msgspec.json.decode(chosen.scale, type=Scale)
    config = engine_config(chosen.model, chosen.weights, Device.CUDA, chosen.dtype, scale)
    print(msgspec.json.encode(measure(config, scale)).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

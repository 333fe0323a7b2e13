"""The measurements on a GPU: an engine alone, and handoffs between two workers that share it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.gpu.shapes import SHAPES, write_model
from bench.handoff.measure import TOKENS, Exposed, measure_exposed
from cluster.config import TransferName, WeightsFrom
from cluster.errors import LaunchError
from cluster.gpu_speed import GpuSpeed

HANDED_TOKENS = 8192
"""Of a request, its answer included: the demo model's context."""
CHUNK_TOKENS = 2048
"""Of a prefill worker that hands over: pages of one chunk go out while the next is computed."""


class Scale(msgspec.Struct, frozen=True):
    """As `engine.measure_gpu` takes it."""

    batches: tuple[int, ...] = (1, 16, 64)
    prompts: tuple[int, ...] = (2048, 8192, 32768)
    context: int = 1024
    chunk_tokens: int = 8192


class Model(NamedTuple):
    name: str
    path: str
    weights: WeightsFrom


class Measured(msgspec.Struct, frozen=True):
    """One model."""

    speed: GpuSpeed
    exposed: Exposed | None
    """Of its handoffs; None: they were not measured."""


def find_model(name: str, folder: Path) -> Model:
    """A shape of `bench.gpu.shapes`, written to `folder`, or any other model as it is."""
    if name in SHAPES:
        return Model(name, str(write_model(name, folder)), WeightsFrom.DUMMY)
    return Model(name, name, WeightsFrom.FILES)


def measure_model(
    model: Model, scale: Scale, repeats: int, seed: int, log_dir: Path, tell: Callable[[str], None], *, handoff: bool
) -> Measured:
    """Raises `LaunchError`, which says so where there is no GPU."""
    speed = measure_engine(model, scale)
    tell(f"{model.name}: decode and prefill are measured")
    exposed = None
    if handoff:
        prompt = HANDED_TOKENS - TOKENS
        exposed = measure_exposed(handoff_settings(model), prompt, repeats, seed, log_dir / model.name)
        tell(f"{model.name}: handoffs are measured")
    return Measured(speed, exposed)


def measure_engine(model: Model, scale: Scale) -> GpuSpeed:
    """By a process of its own."""
    command = [sys.executable, "-m", "engine.measure_gpu", "--model", model.path, "--weights", model.weights.value]
    command += ["--scale", msgspec.json.encode(scale).decode()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise LaunchError(said[0])
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=GpuSpeed)


def handoff_settings(model: Model) -> Sequence[str]:
    """One prefill and one decode worker on the same GPU, whose memory they share."""
    return (
        f"model.path={model.path}",
        f"model.weights={model.weights.value}",
        "model.device=cuda",
        "model.dtype=bfloat16",
        f"kv.transfer={TransferName.NIXL.value}",
        f"kv.pool_tokens={8 * HANDED_TOKENS}",
        f"prefill.chunk_tokens={CHUNK_TOKENS}",
        "prefill.cpus=[]",
        "prefill.gpus=[[0]]",
        "decode.cpus=[]",
        "decode.gpus=[[0]]",
    )

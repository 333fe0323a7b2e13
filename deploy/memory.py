"""`baton plan-memory`: what a model takes of memory, and how much KV a device has room for.

The numbers are computed by a process of the engine's, which knows how weights are held (`engine.memory_plan`).
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table

from cluster.config import DEFAULT_MEMORY_FRACTION, Decode, Dtype, KVDtype, Prefill, Topology
from cluster.errors import ConfigError, LaunchError
from cluster.memory_plan import Capacity, MemoryPlan, MemoryRequest
from cluster.model_files import resolve_model

KINDS = ("embedding", "attention", "mlp", "norms", "head")
UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "80GiB", "24 GB" or a bare number. Raises `ConfigError`."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text!r} is not a size: expected a number and one of B, KiB, MiB, GiB, TiB, KB, MB, GB, TB")
    return int(float(found[1]) * UNITS[(found[2] or "B").upper()])


class Wanted(NamedTuple):
    """What the command line says; None: nothing."""

    tensor_parallel: int | None
    pipeline_parallel: int | None
    context: int | None
    concurrency: int | None
    dtype: Dtype | None
    kv_dtype: KVDtype | None
    gpu_bytes: int | None


def requests(model: str | None, topology: Topology | None, wanted: Wanted) -> list[MemoryRequest]:
    """For a worker of each of the topology's pools, or for one of `model`. Raises `ConfigError`."""
    if topology is not None:
        if model is not None:
            topology = msgspec.structs.replace(topology, model=msgspec.structs.replace(topology.model, path=model))
        planned = _of_topology(topology, on_gpu=wanted.gpu_bytes is not None)
    elif model is not None:
        planned = [MemoryRequest(pool="worker", model_path=str(resolve_model(model)))]
    else:
        raise ConfigError("name a model, or a topology: baton plan-memory MODEL, or --topology FILE")
    given = {key: value for key, value in wanted._asdict().items() if value is not None}
    if wanted.context or wanted.concurrency:
        given |= {"pool_tokens": None, "fills": False}
    return [msgspec.structs.replace(request, **given) for request in planned]


def _of_topology(topology: Topology, *, on_gpu: bool) -> list[MemoryRequest]:
    """A worker of each pool. On a CPU, what a fraction of its memory is, only the machine knows."""
    kv = topology.kv
    fills = on_gpu and (kv.memory_fraction is not None or kv.pool_tokens is None)
    fraction = (kv.memory_fraction or DEFAULT_MEMORY_FRACTION) if fills else 1.0
    pools: list[Prefill | Decode] = [topology.decode] if topology.unified else [topology.prefill, topology.decode]
    return [
        MemoryRequest(
            pool="prefill" if isinstance(pool, Prefill) else "decode",
            model_path=str(resolve_model(topology.model.path)),
            weights=topology.model.weights,
            dtype=topology.model.dtype,
            kv_dtype=topology.kv.dtype,
            kernels=topology.model.kernels,
            tensor_parallel=pool.tensor_parallel,
            pipeline_parallel=pool.pipeline_parallel,
            page_size=topology.kv.page_size,
            chunk_tokens=pool.chunk_tokens,
            max_running=pool.max_running,
            context=topology.model.context_length,
            pool_tokens=topology.pool_pages * kv.page_size,
            memory_fraction=fraction,
            fills=fills,
        )
        for pool in pools
    ]


def ask_engine(requests: Sequence[MemoryRequest]) -> list[MemoryPlan]:
    """Raises `ConfigError` for what the engine refuses, `LaunchError` if it can't be asked."""
    command = [sys.executable, "-m", "engine.memory_plan", msgspec.json.encode(requests).decode()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise (ConfigError if done.returncode == 2 else LaunchError)(said[0])
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=list[MemoryPlan])


def show(plan: MemoryPlan, console: Console) -> None:
    """One plan, as a table with a column for each rank."""
    console.print(
        f"{plan.pool}: {plan.family}, {plan.layers} layers, {plan.parameters / 1e6:,.1f} million parameters; "
        f"on disk {_size(sum(plan.stored.values()))} ({plan.precision})\n"
        f"computes in {plan.dtype} with {plan.kernels} kernels; KV in {plan.kv_dtype}, {plan.token:,} bytes a token, "
        f"pages of {plan.page_size} tokens",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(_table(plan))
    if plan.capacity is not None and plan.gpu_bytes is not None:
        console.print(_verdict(plan, plan.capacity, plan.gpu_bytes), highlight=False, soft_wrap=True)


def _table(plan: MemoryPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("on disk", justify="right")
    for rank in range(len(plan.ranks)):
        table.add_column("in memory" if len(plan.ranks) == 1 else f"rank {rank}", justify="right")
    for kind in KINDS:
        sizes = [rank.weights.get(kind, 0) for rank in plan.ranks]
        table.add_row(kind, _size(plan.stored.get(kind, 0)), *map(_size, sizes))
    weights = [sum(rank.weights.values()) for rank in plan.ranks]
    table.add_row("weights", _size(sum(plan.stored.values())), *map(_size, weights), style="bold")
    table.add_row(f"KV of {plan.pool_tokens:,} tokens", "", *(_size(rank.pool) for rank in plan.ranks))
    table.add_row("activations, about", "", *(_size(rank.activations) for rank in plan.ranks))
    table.add_row("runtime, an allowance", "", *(_size(rank.runtime) for rank in plan.ranks))
    table.add_row("total", "", *(_size(rank.total) for rank in plan.ranks), style="bold")
    return table


def _verdict(plan: MemoryPlan, capacity: Capacity, gpu_bytes: int) -> str:
    """Whether it fits, and what would."""
    budget = int(gpu_bytes * plan.memory_fraction)
    place = _size(budget) if budget == gpu_bytes else f"{_size(budget)} ({plan.memory_fraction:g} of the GPU's memory)"
    if capacity.free < 0:
        return f"does not fit: without any KV it takes {_size(-capacity.free)} more than {place}"
    fullest = max(rank.total for rank in plan.ranks)
    word = "fits" if fullest <= budget else "does not fit"
    return (
        f"{word} in {place}: room for {capacity.tokens:,} tokens of KV, "
        f"{capacity.requests:,} requests of {plan.context:,} tokens"
    )


def _size(count: int) -> str:
    """In the largest unit of which there is at least one."""
    for unit in ("GiB", "MiB", "KiB"):
        if count >= UNITS[unit.upper()]:
            return f"{count / UNITS[unit.upper()]:,.2f} {unit}"
    return f"{count} B"

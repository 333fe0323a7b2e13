"""All that an engine needs to know before it is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from cluster.config import (
    Attention,
    Decode,
    DecodeScheduling,
    Device,
    Dtype,
    Kernels,
    KVDtype,
    Prefill,
    PrefillScheduling,
    SchedulingPolicy,
    Switch,
    Topology,
    WeightsFrom,
)
from cluster.model_files import resolve_model
from cluster.shards import Grid


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that an engine needs to know. `model_path` is a folder or a .gguf file that exists."""

    model_path: Path
    model_name: str
    dtype: Dtype
    kv_dtype: KVDtype = KVDtype.AUTO
    weights: WeightsFrom = WeightsFrom.FILES
    page_size: int
    pool_pages: int | None = None
    """None: the default of the device, see `engine.pool_size`."""
    memory_fraction: float | None = None
    """Decides about the pool's size, if it is set."""
    max_running: int
    """Sequences in the step loop at a time."""
    chunk_tokens: int
    """Prompt tokens of one step, over all sequences."""
    context_length: int | None = None
    """Shortens the model's own."""
    prefix_cache: bool = True
    threads: int = 1
    """Of torch's operators and the native kernels, on CPU."""
    kernels: Kernels = Kernels.AUTO
    attention: Attention = Attention.AUTO
    graphs: Switch = Switch.NEVER
    compile: bool = False
    symmetric_memory: Switch = Switch.NEVER
    device: Device = Device.CPU
    grid: Grid = Grid()
    """Of the worker's ranks."""
    # What these mean stands in `cluster.config`: they are the scheduling sections of both pools.
    policy: SchedulingPolicy = SchedulingPolicy.FIRST_COME
    ageing_seconds: float = 10.0
    commit_quantile: float = 1.0
    conservativeness: float = 0.0
    prefill_delay_seconds: float = 0.0
    retract_every_steps: int = 0
    fill_steps: bool = True
    ahead: Switch = Switch.NEVER

    @classmethod
    def from_topology(cls, topology: Topology, pool: Prefill | Decode, *, threads: int) -> EngineConfig:
        """Of a worker of this cluster's `pool`. Raises `ModelError` if the model is not there."""
        return cls(
            model_path=resolve_model(topology.model.path),
            model_name=topology.served_model,
            dtype=topology.model.dtype,
            kv_dtype=topology.kv.dtype,
            weights=topology.model.weights,
            page_size=topology.kv.page_size,
            pool_pages=None if topology.kv.pool_tokens is None else topology.pool_pages,
            memory_fraction=topology.kv.memory_fraction,
            max_running=pool.max_running,
            chunk_tokens=pool.chunk_tokens,
            context_length=topology.model.context_length,
            prefix_cache=topology.kv.prefix_cache,
            threads=threads,
            kernels=topology.model.kernels,
            attention=topology.model.attention,
            # Prefill's steps are of all sizes, and few.
            graphs=topology.model.graphs if isinstance(pool, Decode) else Switch.NEVER,
            compile=topology.model.compile,
            symmetric_memory=topology.model.symmetric_memory,
            device=topology.model.device,
            grid=pool.grid,
            **_scheduling(pool.scheduling, unified=topology.unified),
        )


def _scheduling(section: PrefillScheduling | DecodeScheduling, *, unified: bool) -> dict[str, Any]:
    """Its keys, with what depends on the topology filled in."""
    keys = msgspec.structs.asdict(section)
    if keys.get("conservativeness", 0.0) is None:
        keys["conservativeness"] = 0.0 if unified else 1.0
    return keys

"""What `python -m engine.memory_plan` is asked, and what it answers: a model's need of memory. Sizes are in bytes."""

from __future__ import annotations

import msgspec

from cluster.config import Dtype, Kernels, KVDtype, WeightsFrom


class MemoryRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as it is planned."""

    pool: str
    """Its name, for people."""
    model_path: str
    """A folder or a .gguf file that exists."""
    weights: WeightsFrom = WeightsFrom.FILES
    dtype: Dtype = Dtype.AUTO
    kv_dtype: KVDtype = KVDtype.AUTO
    kernels: Kernels = Kernels.AUTO
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    page_size: int = 16
    chunk_tokens: int = 512
    max_running: int = 64
    context: int | None = None
    """Tokens of one request, at most; by default the model's context."""
    concurrency: int = 1
    """Requests whose KV is in the pool at the same time."""
    pool_tokens: int | None = None
    """The pool's size; by default `concurrency` times `context`."""
    gpu_bytes: int | None = None
    """Memory of one GPU; None: the worker is on a CPU."""
    memory_fraction: float = 1.0
    """Of a GPU's, that the worker may take."""
    fills: bool = False
    """The pool is what that leaves, and not of `pool_tokens`."""


class RankMemory(msgspec.Struct, frozen=True):
    """Of one process of a worker."""

    weights: dict[str, int]
    """By kind of tensor, as they are held."""
    page: int
    """One page of KV."""
    pool: int
    activations: int
    """The largest step's, about."""
    runtime: int
    """An allowance for what is not computed: the interpreter, libraries, kernels."""

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.pool + self.activations + self.runtime


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank's memory went to, as seen when it was ready; by the names of `RankMemory`."""

    device: str
    """`cpu`, or `cuda:N`."""
    total: int
    """Of a GPU, all; on a CPU, what was available when the process started."""
    weights: int
    pool: int
    activations: int
    """The largest step's, when all steps had been tried."""
    graphs: int
    """Captured CUDA graphs' own."""
    runtime: int
    """All else of this process."""
    free: int
    """Nobody's, neither ours nor another process's."""


class Capacity(msgspec.Struct, frozen=True):
    """What a GPU's memory, or the fraction of it that is the worker's, leaves for KV; of a group, what its fullest rank
    leaves."""

    free: int
    """After the weights, activations and runtime; below 0, so much is missing."""
    tokens: int
    requests: int
    """Of `MemoryPlan.context` tokens."""


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True):
    pool: str
    family: str
    layers: int
    parameters: int
    precision: str
    """What the matrices are stored as."""
    stored: dict[str, int]
    """On disk, by kind of tensor."""
    dtype: str
    kv_dtype: str
    kernels: str
    page_size: int
    context: int
    concurrency: int
    pool_tokens: int
    token: int
    """KV of one token, over all ranks (heads that several have count for each)."""
    gpu_bytes: int | None
    memory_fraction: float = 1.0
    ranks: list[RankMemory]
    capacity: Capacity | None
    """None without `gpu_bytes`."""

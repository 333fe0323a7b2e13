"""`python -m engine.memory_plan`: what a model takes of memory, computed from its files' headers; nothing is loaded.

Takes `cluster.memory_plan.MemoryRequest`s as a JSON list, prints `MemoryPlan`s. KV pools are exact, and so are weights
on a CPU: they are counted as the decoders hold them (but for what oneDNN pads where sizes are odd). On a GPU they are
counted as they will be held. Activations are those of the largest step, about; the runtime is an allowance.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch

from cluster.config import Dtype, Kernels, KVDtype, WeightsFrom
from cluster.errors import BatonError, ConfigError
from cluster.layout import DTYPE_BYTES, KVLayout
from cluster.memory_plan import Capacity, MemoryPlan, MemoryRequest, RankMemory
from cluster.shards import Grid, even_range, key_value_heads, layers_of, query_heads
from engine.attention.torch_paged import BLOCK_SCORES
from engine.device import resolve_dtype
from engine.huge_pages import Arena
from engine.model_config import ModelConfig
from engine.native.library import NativeUnavailable, load
from engine.native.packing import LANES, packed_bytes
from engine.pool_size import FLOAT_BYTES, NESTED_STEPS, SAMPLER_COPIES, TRIAL_PAGES
from engine.shard import INNER_UNIT, VOCABULARY_UNIT
from engine.weights import open_model
from engine.weights.base import ModelFiles, parameter_shapes

MIB = 1 << 20
RUNTIME = {"cpu": 400 * MIB, "cuda": 1024 * MIB}
"""Interpreter and torch; on a GPU, CUDA's context, the libraries' work space, captured graphs."""

Sizes = dict[str, int]
"""Bytes by kind of tensor."""


def open_headers(request: MemoryRequest) -> ModelFiles:
    """The model that is asked for. A config.json alone will do: one plans before one downloads. Raises `ModelError`."""
    path = Path(request.model_path)
    absent = path.is_dir() and not any(path.glob("*.safetensors"))
    return open_model(path, WeightsFrom.DUMMY if absent else request.weights)


def plan_memory(request: MemoryRequest, files: ModelFiles) -> MemoryPlan:
    """Of the model in `files`. Raises `ConfigError` for what can't be."""
    config, checkpoint = files
    context = request.context or config.context_length
    if context > config.context_length:
        raise ConfigError(f"a context of {context} tokens is more than the model's {config.context_length}")
    grid = _grid(request, config)
    device = "cpu" if request.gpu_bytes is None else "cuda"
    dtype = _dtype(request.dtype, device)
    kv_dtype = (dtype if request.kv_dtype is KVDtype.AUTO else request.kv_dtype).value
    item = DTYPE_BYTES[dtype.value]
    kernels = _kernels(request, dtype, device)
    layout = KVLayout(
        checkpoint.identity, kv_dtype, request.page_size, config.layers, config.kv_heads, config.head_dim,
        shards=grid.shards, stages=grid.stages,
    )  # fmt: skip
    pool_pages = request.concurrency * layout.pages_for(context)
    if request.pool_tokens is not None:
        pool_pages = layout.pages_for(request.pool_tokens)
    ranks: list[RankMemory] = []
    for rank in range(grid.ranks):
        part = _part(config, grid, rank)
        sizes = _of_stage(held(part, dtype, kernels, device), part, grid, rank, item)
        kept = _kept(checkpoint.kept_bytes(), config, grid, rank) if device == "cuda" else {}
        page = layout.of_rank(rank).page_bytes
        ranks.append(
            RankMemory(
                weights=_quantised(sizes, kept, config, part, item),
                page=page,
                pool=0,
                activations=_activations(request, part, config.vocab_size, item, context),
                runtime=RUNTIME[device],
            )
        )
    capacity = None
    if request.gpu_bytes is not None:
        budget = int(request.gpu_bytes * request.memory_fraction)
        capacity = _capacity(budget, ranks, request.page_size, layout.pages_for(context))
        if request.fills:
            pool_pages = layout.pages_for(capacity.tokens)
    ranks = [msgspec.structs.replace(rank, pool=(pool_pages + TRIAL_PAGES) * rank.page) for rank in ranks]
    return MemoryPlan(
        pool=request.pool,
        family=config.family,
        layers=config.layers,
        parameters=sum(math.prod(shape) for shape in parameter_shapes(config).values()),
        precision=checkpoint.precision,
        stored=_by_kind(checkpoint.stored_bytes()),
        dtype=dtype.value,
        kv_dtype=kv_dtype,
        kernels=kernels.value,
        page_size=request.page_size,
        context=context,
        concurrency=request.concurrency,
        pool_tokens=pool_pages * request.page_size,
        token=sum(each.page for each in ranks) // request.page_size,
        gpu_bytes=request.gpu_bytes,
        memory_fraction=request.memory_fraction,
        ranks=ranks,
        capacity=capacity,
    )


def _grid(request: MemoryRequest, config: ModelConfig) -> Grid:
    """Of the ranks that share the model. Raises `ConfigError` if they are too many."""
    grid = Grid(request.tensor_parallel, request.pipeline_parallel)
    if not 1 <= grid.shards <= config.heads:
        raise ConfigError(f"{grid.shards} ranks can't share the model's {config.heads} query heads")
    if not 1 <= grid.stages <= config.layers:
        raise ConfigError(f"{grid.stages} stages can't share the model's {config.layers} layers")
    return grid


def held(config: ModelConfig, dtype: Dtype, kernels: Kernels, device: str) -> Sizes:
    """Weights as the decoder of these kernels holds them, of a model or of a rank's part of one."""
    item = DTYPE_BYTES[dtype.value]
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim

    def matrix(outputs: int, inputs: int) -> int:
        if kernels is Kernels.NATIVE:
            return Arena.padded(packed_bytes(outputs, inputs, item))
        return outputs * inputs * item

    paired = -(-inner // LANES) * LANES if kernels is Kernels.NATIVE else inner
    attention = matrix(query + 2 * key, hidden) + matrix(hidden, query)
    attention += item * (config.qkv_bias * (query + 2 * key) + config.output_bias * hidden)
    mlp = 2 * matrix(inner, hidden) + matrix(hidden, inner) + item * config.mlp_bias * (2 * paired + hidden)
    norms = 2 * hidden + config.query_key_norm * (query + key)
    # On a CPU each matrix is packed into memory of its own; elsewhere a tied head is the embedding.
    shared = config.tied_embeddings and device != "cpu"
    return {
        "embedding": vocabulary * hidden * item,
        "attention": config.layers * attention,
        "mlp": config.layers * mlp,
        "norms": item * (config.layers * norms + hidden),
        "head": 0 if shared else matrix(vocabulary, hidden),
    }


def _quantised(plain: Sizes, kept: Mapping[str, int], config: ModelConfig, part: ModelConfig, item: int) -> Sizes:
    """`plain`, with the layers' products as small as they are on disk where kernels take them so: `kept`."""
    sizes = Counter(plain)
    whole = parameter_shapes(config)
    own = parameter_shapes(msgspec.structs.replace(part, layers=config.layers))
    for name, size in kept.items():
        if kind_of(name) in ("attention", "mlp"):
            sizes[kind_of(name)] += size * math.prod(own[name]) // math.prod(whole[name]) - item * math.prod(own[name])
    return dict(sizes)


def _kept(sizes: Mapping[str, int], config: ModelConfig, grid: Grid, rank: int) -> Sizes:
    """Of a rank's own layers."""
    own = {f"model.layers.{layer}" for layer in layers_of(config.layers, grid.stages, grid.stage_of(rank))}
    return {name: size for name, size in sizes.items() if ".".join(name.split(".")[:3]) in own}


def _part(config: ModelConfig, grid: Grid, rank: int) -> ModelConfig:
    """What a rank has, as a model for itself; as `engine.stage` and `engine.shard` divide it."""
    shards, shard = grid.shards, grid.shard_of(rank)
    return msgspec.structs.replace(
        config,
        layers=len(layers_of(config.layers, grid.stages, grid.stage_of(rank))),
        heads=len(query_heads(config.heads, config.kv_heads, shards, shard)),
        kv_heads=len(key_value_heads(config.kv_heads, shards, shard)),
        intermediate_size=len(even_range(config.intermediate_size, shards, shard, INNER_UNIT)),
        vocab_size=len(even_range(config.vocab_size, shards, shard, VOCABULARY_UNIT)),
    )


def _of_stage(sizes: Sizes, part: ModelConfig, grid: Grid, rank: int, item: int) -> Sizes:
    """Without the embedding, or the head and its norm, that other stages have."""
    first, last = grid.stage_of(rank) == 0, grid.stage_of(rank) == grid.stages - 1
    own = dict(sizes)
    if not last:
        own["head"] = 0
        own["norms"] -= item * part.hidden_size
    if not first and not (last and part.tied_embeddings):
        own["embedding"] = 0
    return own


def _activations(request: MemoryRequest, part: ModelConfig, vocabulary: int, item: int, context: int) -> int:
    """Of the largest step that the scheduler makes: all chunks' tokens, and one of each that decodes."""
    rows = request.chunk_tokens + request.max_running
    query, key = part.heads * part.head_dim, part.kv_heads * part.head_dim
    # The residual stream and its norm, the fused projection, what was attended, gate and up and what they give.
    widths = 2 * part.hidden_size + (query + 2 * key) + query + 3 * part.intermediate_size
    attention = 2 * key * context + 2 * BLOCK_SCORES
    sampling = request.max_running * vocabulary * FLOAT_BYTES * SAMPLER_COPIES
    return NESTED_STEPS * rows * widths * item + attention * item + sampling


def _capacity(budget: int, ranks: list[RankMemory], page_size: int, pages_of_request: int) -> Capacity:
    free = [budget - (rank.total - rank.pool) for rank in ranks]
    pages = min(max(0, left // rank.page - TRIAL_PAGES) for left, rank in zip(free, ranks, strict=True))
    return Capacity(min(free), pages * page_size, pages // pages_of_request)


def _by_kind(sizes: Mapping[str, int]) -> Sizes:
    """Of parameters by name, those of one kind added up."""
    kinds = Counter[str]()
    for name, size in sizes.items():
        kinds[kind_of(name)] += size
    return dict(kinds)


def kind_of(name: str) -> str:
    """Of a parameter, by its Hugging Face name."""
    if "embed_tokens" in name:
        return "embedding"
    if name.startswith("lm_head"):
        return "head"
    if "norm" in name:
        return "norms"
    return "attention" if ".self_attn." in name else "mlp"


def _dtype(wanted: Dtype, device: str) -> Dtype:
    if device == "cuda" and wanted is Dtype.AUTO:
        return Dtype.BFLOAT16  # of all GPUs since Ampere
    return resolve_dtype(wanted, torch.device(device))


def _kernels(request: MemoryRequest, dtype: Dtype, device: str) -> Kernels:
    """As `engine.decoders` chooses."""
    unknown = dtype is Dtype.FLOAT16 or request.kv_dtype is not KVDtype.AUTO
    if request.kernels is Kernels.TORCH or device != "cpu" or unknown:
        return Kernels.TORCH
    try:
        load()
    except NativeUnavailable:
        if request.kernels is Kernels.NATIVE:
            raise
        return Kernels.TORCH
    return Kernels.NATIVE


def main(requests: str) -> int:
    """Prints the plans, or why there are none; returns the exit status."""
    try:
        plans = [
            plan_memory(request, open_headers(request))
            for request in msgspec.json.decode(requests, type=list[MemoryRequest])
        ]
    except BatonError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(msgspec.json.encode(plans).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

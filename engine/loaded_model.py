"""A model that is ready to compute: files opened, pool made, weights read; on one of several ranks, its part."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cluster.config import Kernels, KVDtype
from cluster.errors import ConfigError
from cluster.layout import KVLayout
from cluster.logging import get_logger
from cluster.messages import ModelCard
from cluster.ranks import Rank
from engine.decoder import Decoder
from engine.decoders import make_decoder
from engine.device import open_device, resolve_dtype
from engine.device_memory import MemoryAccount, open_memory
from engine.engine_config import EngineConfig
from engine.joining import join_ranks
from engine.kv_cache import KVCache
from engine.line import Line
from engine.pool_size import (
    PROFILED_PAGES,
    TRIAL_PAGES,
    LargestStep,
    fraction_of,
    least_of_all,
    pages_asked_for,
    room_left,
)
from engine.shard import Shard
from engine.weights import open_model

log = get_logger(__name__)


class LoadedModel(NamedTuple):
    card: ModelCard
    layout: KVLayout
    """Of the whole worker."""
    cache: KVCache
    """This rank's heads and layers of all pages."""
    decoder: Decoder
    line: Line | None
    """To the other stages, if the layers are divided."""
    memory: MemoryAccount
    """This rank's."""


def load_model(config: EngineConfig, rank: Rank) -> LoadedModel:
    """Raises `ModelError` or `ConfigError`. Returns when all ranks have theirs."""
    files = open_model(config.model_path, config.weights)
    architecture = files.config
    device = open_device(config.device, rank.place, rank.neighbours, config.threads)
    memory = open_memory(device)
    dtype = resolve_dtype(config.dtype, device)
    layout = KVLayout(
        model=files.weights.identity,
        dtype=(dtype if config.kv_dtype is KVDtype.AUTO else config.kv_dtype).value,
        page_size=config.page_size,
        layers=architecture.layers,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        shards=config.grid.shards,
        stages=config.grid.stages,
    )
    parts = join_ranks(architecture, config.grid, rank, device, config.symmetric_memory)
    fraction = fraction_of(config, device)
    pages = pages_asked_for(config) + TRIAL_PAGES if fraction is None else PROFILED_PAGES
    cache = KVCache(layout.of_rank(rank.number), pages, device, getattr(torch, dtype.value))
    decoder = make_decoder(
        config.kernels,
        architecture,
        files.weights,
        cache,
        config.threads,
        parts.shard,
        config.attention,
        parts.stage,
        config.graphs,
        compiled=config.compile,
    )
    if parts.shard is not None:
        _require_same(decoder, parts.shard, device)
    context = _context_length(config, architecture.context_length)
    work_space = 0
    if fraction is not None:
        largest = LargestStep(config, context, architecture.vocab_size)
        room = room_left(memory, fraction, cache.page_bytes, decoder, largest)
        work_space = room.work_space
        cache = KVCache(cache.layout, least_of_all(room.pages, parts.everyone, device), device, cache.dtype)
        decoder.use(cache)
    log.info(
        "weights and KV pool are in memory",
        device=cache.device,
        kernels=decoder.kernels.value,
        precision=files.weights.precision,
        weights_bytes=decoder.weight_bytes,
        pool_bytes=cache.nbytes,
    )
    card = ModelCard(config.model_name, context, architecture.vocab_size)
    account = MemoryAccount(memory, cache.device, decoder.weight_bytes, cache.nbytes, work_space)
    return LoadedModel(card, layout, cache, decoder, parts.line, account)


def _require_same(decoder: Decoder, shard: Shard, device: torch.device) -> None:
    """Raises `ConfigError` if ranks compute by different kernels: what they pad, and so what they add up, differs."""
    native = shard.add_up(torch.tensor([float(decoder.kernels is Kernels.NATIVE)], device=device)).item()
    if native not in (0, shard.group.size):
        raise ConfigError("model.kernels: not all ranks can have the native ones; set it to torch")


def _context_length(config: EngineConfig, models_own: int) -> int:
    wanted = config.context_length
    if wanted is not None and wanted > models_own:
        raise ConfigError(f"model.context_length: {wanted} is more than the model's {models_own}")
    return wanted or models_own

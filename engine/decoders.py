"""Which decoder computes on this machine."""

from __future__ import annotations

from cluster.config import Attention, Kernels, Switch
from cluster.errors import ConfigError
from cluster.logging import get_logger
from engine.decoder import Decoder
from engine.graphed_decoder import CudaGraphs, GraphedDecoder
from engine.kv_cache import KVCache
from engine.model_config import ModelConfig
from engine.native.decoder import NativeDecoder
from engine.native.library import NativeUnavailable
from engine.shard import Shard, ShardedWeights
from engine.stage import Stage, StageWeights
from engine.torch_decoder import TorchDecoder
from engine.weights.base import Weights

log = get_logger(__name__)


def make_decoder(
    kernels: Kernels,
    config: ModelConfig,
    weights: Weights,
    cache: KVCache,
    threads: int,
    shard: Shard | None = None,
    attention: Attention = Attention.AUTO,
    stage: Stage | None = None,
    graphs: Switch = Switch.NEVER,
    *,
    compiled: bool = False,
) -> Decoder:
    """The native one, or torch's where it is asked for or (with `AUTO`) where the native one can't be. `config` and
    `weights` are of the whole model; with a `stage`, the decoder has those layers of it, and with a `shard`, which is
    of the stage's part, those heads: so must `cache`.

    Raises `NativeUnavailable` if only the native one will do, and `ConfigError` for graphs that there can't be.
    """
    if stage is not None:
        config, weights = stage.config, StageWeights(weights, stage)
    if shard is not None:
        config, weights = shard.config, ShardedWeights(weights, shard)
    if kernels is Kernels.TORCH or (kernels is Kernels.AUTO and cache.pool.device.type != "cpu"):
        return with_graphs(TorchDecoder(config, weights, cache, shard, attention, stage, compiled=compiled), graphs)
    try:
        return NativeDecoder(config, weights, cache, threads, shard, stage)
    except NativeUnavailable as error:
        if kernels is Kernels.NATIVE:
            raise
        log.warning("computing with torch's operators, which are slower", reason=str(error))
        return with_graphs(TorchDecoder(config, weights, cache, shard, attention, stage, compiled=compiled), graphs)


def with_graphs(decoder: TorchDecoder, wanted: Switch) -> Decoder:
    """Decode steps of `decoder` as CUDA graphs, where that is possible and `wanted`."""
    if wanted is Switch.NEVER:
        return decoder
    if decoder.device.type != "cuda" or not decoder.alone:
        if wanted is Switch.ALWAYS:
            raise ConfigError(f"model.graphs: they are for a model that one GPU has to itself, not {decoder.device}")
        return decoder
    return GraphedDecoder(decoder, CudaGraphs(decoder.device).record, required=wanted is Switch.ALWAYS)

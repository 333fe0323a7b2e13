"""Which decoder computes on this machine."""

from __future__ import annotations

from cluster.config import Attention, Kernels
from cluster.logging import get_logger
from engine.decoder import Decoder
from engine.kv_cache import KVCache
from engine.model_config import ModelConfig
from engine.native.decoder import NativeDecoder
from engine.native.library import NativeUnavailable
from engine.shard import Shard, ShardedWeights
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
) -> Decoder:
    """The native one, or torch's where it is asked for or (with `AUTO`) where the native one can't be. `config` and
    `weights` are of the whole model; with a `shard`, the decoder has that part of it, and `cache` must have its heads.

    Raises `NativeUnavailable` if only the native one will do.
    """
    if shard is not None:
        config, weights = shard.config, ShardedWeights(weights, shard)
    if kernels is Kernels.TORCH or (kernels is Kernels.AUTO and cache.pool.device.type != "cpu"):
        return TorchDecoder(config, weights, cache, shard, attention)
    try:
        return NativeDecoder(config, weights, cache, threads, shard)
    except NativeUnavailable as error:
        if kernels is Kernels.NATIVE:
            raise
        log.warning("computing with torch's operators, which are slower", reason=str(error))
        return TorchDecoder(config, weights, cache, shard, attention)

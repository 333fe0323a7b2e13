"""Which operators a decoder computes with."""

from __future__ import annotations

from cluster.config import Attention
from cluster.logging import get_logger
from engine.attention.flashinfer_paged import FlashInferUnavailable, open_flashinfer
from engine.kv_cache import KVCache
from engine.model_config import ModelConfig
from engine.operators.base import Operators
from engine.operators.flashinfer_operators import FlashInferOperators, disagreement
from engine.operators.torch_operators import CompiledOperators, TorchOperators
from engine.rope import RotaryEmbedding

log = get_logger(__name__)


def make_operators(
    wanted: Attention, cache: KVCache, config: ModelConfig, rope: RotaryEmbedding, *, compiled: bool
) -> Operators:
    """torch's, `compiled` if that is asked for; on a GPU flashinfer's, where they may be had and attention is not
    `wanted` from torch."""
    epsilon, device = config.norm_epsilon, cache.pool.device
    if compiled:
        return CompiledOperators(epsilon)
    if wanted is Attention.TORCH or device.type != "cuda":
        return TorchOperators(epsilon)
    try:
        operators = FlashInferOperators(epsilon, open_flashinfer(cache))
        wrong = disagreement(operators, epsilon, rope, config.head_dim, device, cache.dtype)
    except FlashInferUnavailable:
        return TorchOperators(epsilon)  # attention has said why
    except (RuntimeError, TypeError, ValueError) as error:
        wrong = str(error)
    if wrong is None:
        return operators
    log.warning("norms, rotation and activation by torch's operators, which are slower", reason=wrong)
    return TorchOperators(epsilon)

"""Which attention torch's decoder uses on this device."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.config import Attention
from cluster.logging import get_logger
from engine.attention.base import AttentionBackend
from engine.attention.flashinfer_paged import FlashInferAttention, FlashInferUnavailable, open_flashinfer
from engine.attention.torch_paged import TorchPagedAttention
from engine.kv_cache import KVCache

log = get_logger(__name__)


def make_attention(wanted: Attention, cache: KVCache, heads: int, windows: Sequence[int | None]) -> AttentionBackend:
    """flashinfer's, or torch's where it is asked for or (with `AUTO`) where flashinfer can't be.

    Raises `FlashInferUnavailable` if only flashinfer will do.
    """
    if wanted is Attention.TORCH or (wanted is Attention.AUTO and cache.pool.device.type != "cuda"):
        return TorchPagedAttention(cache, heads, windows)
    try:
        return FlashInferAttention(cache, heads, windows, open_flashinfer(cache))
    except FlashInferUnavailable as error:
        if wanted is Attention.FLASHINFER:
            raise
        log.warning("attention by torch's operators, which are slower", reason=str(error))
        return TorchPagedAttention(cache, heads, windows)

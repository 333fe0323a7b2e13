"""top-p by flashinfer's kernel: one pass or two over the probabilities, where the sampler's own needs thirty.

Used where it agrees with the sampler's when it is tried; on a GPU it has not run so far.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cluster.config import Attention
from cluster.logging import get_logger
from engine.attention.flashinfer_paged import FlashInferUnavailable, open_flashinfer
from engine.kv_cache import KVCache
from engine.sampler import Nucleus, nucleus_by_bisection

log = get_logger(__name__)

LEAST_MASS = 1e-6
"""The kernel is for more than none; the most likely token has it in any vocabulary."""
TRIED_ROWS = 4
TRIED_SHARES = (0.1, 0.5, 0.9, 0.99)
TOLERANCE = 1e-3
"""Of the mass that one of them leaves and the other does not: the kernel adds up in its own way."""


class Library(Protocol):
    """What we use of the module `flashinfer`."""

    def top_p_renorm_probs(self, probs: Tensor, top_p: Tensor, is_deterministic: bool) -> Tensor:
        """`probs`, float32, without all but the fewest most likely that hold `top_p` [rows], float32; rows of sum 1."""


class FlashInferNucleus:
    """A `Nucleus`. Its sums don't depend on the order in which a GPU's blocks come to them."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def __call__(self, probabilities: Tensor, mass: Tensor) -> Tensor:
        left = self._library.top_p_renorm_probs(probabilities, mass[:, 0].float().clamp_min(LEAST_MASS), True)
        return torch.where(left > 0, probabilities, torch.inf).amin(-1, keepdim=True)


def make_nucleus(wanted: Attention, cache: KVCache, vocabulary: int) -> Nucleus | None:
    """flashinfer's, on a GPU that has it, unless attention is `wanted` from torch. None: the sampler's own."""
    if wanted is Attention.TORCH or cache.pool.device.type != "cuda":
        return None
    try:
        nucleus = FlashInferNucleus(open_flashinfer(cache))
        wrong = "another nucleus" if disagrees(nucleus, vocabulary, cache.pool.device) else None
    except FlashInferUnavailable:
        return None  # attention has said why
    except (RuntimeError, TypeError, ValueError) as error:
        wrong = str(error)
    if wrong is None:
        return nucleus
    log.warning("top-p by bisection, which is slower", reason=wrong)
    return None


def disagrees(tried: Nucleus, vocabulary: int, device: torch.device) -> bool:
    """Whether it leaves something else of some random rows than the sampler's own. Raises what it raises."""
    logits = torch.randn(TRIED_ROWS, vocabulary, generator=torch.Generator().manual_seed(0))
    # From nearly all tokens to a few of them.
    rows = (logits * torch.linspace(0.5, 6.0, TRIED_ROWS)[:, None]).softmax(-1).to(device)
    for share in TRIED_SHARES:
        mass = torch.full((TRIED_ROWS, 1), share, dtype=torch.float64, device=device)
        held = [torch.where(rows >= find(rows, mass), rows, 0.0).sum(-1) for find in (tried, nucleus_by_bisection)]
        if not (held[0] - held[1]).abs().max() <= TOLERANCE:
            return True
    return False

"""The operators by flashinfer, for NVIDIA GPUs: one kernel each, in place where that is possible.

They agree with torch's but for rounding: rotations are computed in float32. The library is compiled when it is first
used. What it is given has been computed with on a CPU, in the tests; on a GPU it has not run so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from engine.linear import Linear
from engine.operators.base import Operators, Rotation
from engine.operators.torch_operators import TorchOperators
from engine.rope import RotaryEmbedding

TRIED_ROWS = 5
TRIED_WIDTH = 512
TRIED_HEADS = 6
TOLERANCE = 2e-2
"""Of the difference to torch's operators, relative to the largest value: two roundings of bfloat16 are 2**-7."""


class Library(Protocol):
    """What we use of the module `flashinfer`."""

    def rmsnorm(self, input: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def fused_add_rmsnorm(self, input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
        """residual += input; input = norm(residual)."""

    def apply_rope_with_cos_sin_cache_inplace(
        self, positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox: bool
    ) -> None:
        """Row `positions[i]` of the cache, float32 [rows, head_size], has the cosines and then the sines for row i."""

    def silu_and_mul(self, input: Tensor) -> Tensor: ...


class FlashInferOperators:
    """Implements `Operators`, for bfloat16 and float16."""

    def __init__(self, epsilon: float, library: Library) -> None:
        self._epsilon = epsilon
        self._library = library

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return self._library.rmsnorm(hidden, weight, self._epsilon)

    def add_norm(self, hidden: Tensor, change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        self._library.fused_add_rmsnorm(change, hidden, weight, self._epsilon)
        return hidden, change

    def product_add_norm(self, hidden: Tensor, linear: Linear, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.add_norm(hidden, linear(inputs), weight)

    def rotation(self, rope: RotaryEmbedding, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """A table of the step's own rows: one of all positions would take megabytes, and ends somewhere."""
        return torch.arange(len(positions), device=positions.device), torch.cat(rope.angles(positions), -1)

    def rotate(self, query_key: Tensor, heads: int, rotation: Rotation) -> Tensor:
        rows, table = rotation
        query, key = query_key[:, :heads], query_key[:, heads:]
        self._library.apply_rope_with_cos_sin_cache_inplace(rows, query, key, query_key.shape[-1], table, True)
        return query_key

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._library.silu_and_mul(gate_up)


def disagreement(
    tried: Operators, epsilon: float, rope: RotaryEmbedding, head_dim: int, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Which of its operators computes something else than torch's, on some random rows; None: none does. Raises what
    it raises."""
    reference = TorchOperators(epsilon)
    generator = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.randn(TRIED_ROWS, *shape, generator=generator).to(device, dtype)

    hidden, change, weight = rows(TRIED_WIDTH), rows(TRIED_WIDTH), rows(TRIED_WIDTH)[0]
    query_key, positions = rows(TRIED_HEADS, head_dim), torch.arange(TRIED_ROWS, device=device) * 97
    computed: dict[str, Callable[[Operators], Tensor]] = {
        "norm": lambda operators: operators.norm(hidden.clone(), weight),
        "add_norm": lambda operators: torch.stack(operators.add_norm(hidden.clone(), change.clone(), weight)),
        "rotate": lambda operators: operators.rotate(
            query_key.clone(), TRIED_HEADS // 2, operators.rotation(rope, positions, dtype)
        ),
        "silu_mul": lambda operators: operators.silu_mul(hidden.clone()),
    }
    for name, compute in computed.items():
        expected = compute(reference).float()
        if not (compute(tried).float() - expected).abs().max() <= TOLERANCE * expected.abs().max():
            return name
    return None

"""The operators by torch: any device, any dtype, and the reference for the others. And the same, compiled."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from engine.linear import Linear
from engine.operators.base import Rotation
from engine.rope import RotaryEmbedding, rotate


class TorchOperators:
    """Implements `Operators`."""

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self._epsilon)

    def add_norm(self, hidden: Tensor, change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = change.add_(hidden)
        return total, self.norm(total, weight)

    def product_add_norm(self, hidden: Tensor, linear: Linear, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # On CPU, the product adds by itself.
        total = linear.add_to(hidden, inputs)
        return total, self.norm(total, weight)

    def rotation(self, rope: RotaryEmbedding, positions: Tensor, dtype: torch.dtype) -> Rotation:
        return rope.tables(positions, dtype)

    def rotate(self, query_key: Tensor, heads: int, rotation: Rotation) -> Tensor:
        return rotate(query_key, *rotation)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate).mul_(up)


class CompiledOperators:
    """Implements `Operators`: torch's, each of them fused by torch.compile when it is first used, and once more for any
    number of rows when it is used for another. Products are as fast as they get; what is between them is read and
    written once."""

    def __init__(self, epsilon: float) -> None:
        plain = TorchOperators(epsilon)
        self.norm = torch.compile(plain.norm)
        self.add_norm = torch.compile(plain.add_norm)
        self.rotate = torch.compile(plain.rotate)
        self.silu_mul = torch.compile(plain.silu_mul)
        self.rotation = plain.rotation

    def product_add_norm(self, hidden: Tensor, linear: Linear, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.add_norm(hidden, linear(inputs), weight)

"""The operators between a layer's products and its attention, whatever the device.

`engine.torch_decoder` calls them on the step loop's thread. They may use up the tensors that they are given, and read
nothing back from the device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.linear import Linear
from engine.rope import RotaryEmbedding

Rotation = tuple[Tensor, Tensor]
"""What `rotate` has to know of a step's positions; made once for all layers."""


class Operators(Protocol):
    """Made with the model's norm_epsilon."""

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden / rms(hidden) * weight, [rows, size]; keeps `hidden`."""

    def add_norm(self, hidden: Tensor, change: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """hidden + change, and its norm."""

    def product_add_norm(self, hidden: Tensor, linear: Linear, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """hidden + linear(inputs), and its norm; keeps `inputs`."""

    def rotation(self, rope: RotaryEmbedding, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """For heads of `dtype` in rows with these positions."""

    def rotate(self, query_key: Tensor, heads: int, rotation: Rotation) -> Tensor:
        """[rows, heads + kv_heads, head_dim], the last of it contiguous: the first `heads` are of queries, the others
        of keys."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, [rows, size]; `gate_up` [rows, 2 * size] has the gates first."""

"""Matrix products with weights, prepared once for the device they run on.

On CPU, oneDNN reads weights in a blocked order; kept packed in it they are 1.5 to 2.5 times as fast at decode's small
batches as `torch.nn.functional.linear`, which reorders or streams the plain ones. A packed product also gives a row the
same bits whatever the other rows are (if there are any, see `engine.shapes`), so what a request is answered does not
depend on who else is in the batch.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

PACKED_DTYPES = (torch.float32, torch.bfloat16)
TYPICAL_ROWS = 32
"""The batch size that oneDNN is asked to choose the blocking for; others work too."""


class Linear(Protocol):
    """x [rows, inputs] -> x W^T + bias [rows, outputs]. Called on the step loop's thread."""

    nbytes: int
    """Memory that weight and bias take."""

    def __call__(self, inputs: Tensor) -> Tensor: ...

    def add_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """residual [rows, outputs] + self(inputs), as a new tensor."""


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest `Linear` for where `weight` [outputs, inputs] is."""
    packable = weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return PackedLinear(weight, bias) if packable else PlainLinear(weight, bias)


class PlainLinear:
    """Any device, any dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self.nbytes = weight.nbytes + nbytes_of(bias)

    def __call__(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self._weight, self._bias)

    def add_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self._weight, self._bias).add_(residual)


class PackedLinear:
    """CPU, oneDNN; does not keep the plain weight. The operators are those that torch's own inductor emits."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)
        self._bias = bias
        self.nbytes = torch.ops.mkldnn._nbytes(self._weight) + nbytes_of(bias)
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._product_and_sum = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, inputs: Tensor) -> Tensor:
        product: Tensor = self._product(inputs, self._weight, self._bias, "none", [], "")
        return product

    def add_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        total: Tensor = self._product_and_sum(inputs, residual, self._weight, self._bias, "add")
        return total


def nbytes_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes

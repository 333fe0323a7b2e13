"""A quantised matrix in the one form that all checkpoint formats are read into."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cluster.errors import ModelError


class QuantizedMatrix(NamedTuple):
    """weight[o, i] = (codes[o, i] - zeros[b, g]) * scales[b, g], with b = o // block_rows and g = groups[i]."""

    codes: Tensor
    """[outputs, inputs]; float8_e4m3fn, int8, or uint8 with zeros."""
    scales: Tensor
    """float32 [blocks of rows, groups]"""
    zeros: Tensor | None
    """int16, of the scales' shape; None: all 0."""
    block_rows: int
    """Outputs that share their scales."""
    groups: Tensor
    """int64 [inputs]: which of a row's scales each input has."""

    def checked(self) -> QuantizedMatrix:
        """Itself. Raises `ModelError` if its parts don't fit together."""
        outputs, inputs = self.codes.shape
        blocks, groups = self.scales.shape
        fits = (
            blocks == -(-outputs // self.block_rows)
            and len(self.groups) == inputs
            and 0 <= int(self.groups.min()) <= int(self.groups.max()) < groups
            and (self.zeros is None or self.zeros.shape == self.scales.shape)
        )
        if not fits:
            zeros = "no" if self.zeros is None else list(self.zeros.shape)
            raise ModelError(
                f"{outputs} x {inputs} codes, {list(self.scales.shape)} scales, {zeros} zero points, and groups of "
                f"{len(self.groups)} inputs"
            )
        return self

    def dequantized(self) -> Tensor:
        """float32 [outputs, inputs]. A code and a scale of half precision multiply exactly, one of float32 rounds."""
        values = self.codes.to(torch.float32)
        if self.zeros is not None:
            values -= self._spread(self.zeros)
        return values.mul_(self._spread(self.scales))

    @property
    def group_size(self) -> int | None:
        """Neighbouring inputs that share a scale, if groups are all alike and in order; else None."""
        inputs, groups = len(self.groups), self.scales.shape[1]
        size = -(-inputs // groups)
        return size if torch.equal(self.groups.cpu(), grouped(inputs, size)) else None

    def to(self, device: torch.device) -> QuantizedMatrix:
        zeros = None if self.zeros is None else self.zeros.to(device)
        codes, scales, groups = (part.to(device) for part in (self.codes, self.scales, self.groups))
        return QuantizedMatrix(codes, scales, zeros, self.block_rows, groups)

    def rows(self, start: int, stop: int) -> QuantizedMatrix:
        """Outputs [start, stop)."""
        first = start // self.block_rows
        last = -(-stop // self.block_rows)
        block_rows = self.block_rows
        scales, zeros = self.scales[first:last], None if self.zeros is None else self.zeros[first:last]
        if start % block_rows and last - first > 1:
            # The cut is within a block: each row gets its scales for itself.
            within = torch.arange(start, stop) // block_rows - first
            scales, zeros, block_rows = scales[within], None if zeros is None else zeros[within], 1
        return QuantizedMatrix(self.codes[start:stop], scales, zeros, block_rows, self.groups)

    def columns(self, start: int, stop: int) -> QuantizedMatrix:
        """Inputs [start, stop), with the scales that they use."""
        used, groups = torch.unique(self.groups[start:stop], return_inverse=True)
        zeros = None if self.zeros is None else self.zeros[:, used]
        return QuantizedMatrix(self.codes[:, start:stop], self.scales[:, used], zeros, self.block_rows, groups)

    def _spread(self, values: Tensor) -> Tensor:
        """[blocks of rows, groups] -> [outputs, inputs]"""
        rows = values.repeat_interleave(self.block_rows, 0)[: len(self.codes)] if self.block_rows > 1 else values
        return rows.index_select(1, self.groups)


def grouped(inputs: int, size: int) -> Tensor:
    """`QuantizedMatrix.groups` of groups of `size` neighbours."""
    return torch.arange(inputs) // size


def stacked(matrices: list[QuantizedMatrix]) -> QuantizedMatrix | None:
    """Matrices of the same inputs above each other; None if they group their inputs differently (GPTQ's act-order)."""
    first = matrices[0]
    alike = all(
        torch.equal(matrix.groups, first.groups) and matrix.codes.dtype == first.codes.dtype
        and (matrix.zeros is None) == (first.zeros is None)
        for matrix in matrices
    )  # fmt: skip
    if not alike:
        return None
    block_rows = first.block_rows
    if any(matrix.block_rows != block_rows or len(matrix.codes) % block_rows for matrix in matrices):
        matrices, block_rows = [_by_row(matrix) for matrix in matrices], 1
    codes = torch.cat([matrix.codes.view(torch.uint8) for matrix in matrices]).view(first.codes.dtype)
    zeros = [matrix.zeros for matrix in matrices if matrix.zeros is not None]
    scales = torch.cat([matrix.scales for matrix in matrices])
    return QuantizedMatrix(codes, scales, torch.cat(zeros) if zeros else None, block_rows, first.groups)


def _by_row(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same with scales for each row."""
    blocks = torch.arange(len(matrix.codes)) // matrix.block_rows
    zeros = None if matrix.zeros is None else matrix.zeros[blocks]
    return matrix._replace(scales=matrix.scales[blocks], zeros=zeros, block_rows=1)

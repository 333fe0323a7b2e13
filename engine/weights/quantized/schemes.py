"""The formats in which quantised matrices are published, each read into a `QuantizedMatrix`.

A format keeps a matrix as some tensors beside each other ("model.layers.0.mlp.up_proj.qweight", ".scales", ...); here
they are its parts, by the last part of their names. Fields of a 32-bit word are counted from its lowest bits, and
words are little-endian, as on all machines that we run on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from cluster.errors import ModelError
from engine.weights.base import Shape
from engine.weights.quantized.matrix import QuantizedMatrix, grouped

WORD_BITS = 32
AWQ_BITS = 4
AWQ_FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which field of a word of AWQ holds output 0, 1, ... 7 of the eight that share it."""

Parts = Mapping[str, Tensor]


class Scheme(Protocol):
    """One format. Pure: it is given tensors, and reads none."""

    codes: str
    """The part without which a module is not quantised."""
    required: frozenset[str]
    """What a quantised matrix consists of at least, the codes included."""
    parts: frozenset[str]
    """All that it may consist of."""

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """(outputs, inputs) of the matrix with parts of these shapes."""

    def matrix(self, parts: Parts) -> QuantizedMatrix:
        """Of all required parts. Raises `ModelError`, or what torch raises, if they don't fit together."""


class ScaledCodes:
    """A matrix of FP8 or int8, one code per weight, with scales per tensor, output, group of inputs or block.

    So do "fp8" (DeepSeek's blocks with `weight_scale_inv`, which multiplies in spite of its name; AutoFP8's
    `weight_scale` per tensor), "fbgemm_fp8" (per output), and compressed-tensors but for its packed format.
    """

    codes = "weight"

    def __init__(self, scale: str = "weight_scale", block: tuple[int, int] | None = None) -> None:
        """`block`: outputs and inputs that share a scale; None: the scales' number tells tensor from outputs."""
        self._scale = scale
        self._block = block
        self.required = frozenset({"weight", scale})
        self.parts = self.required | {"weight_zero_point"}

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        return shapes["weight"]

    def matrix(self, parts: Parts) -> QuantizedMatrix:
        codes, scales = parts["weight"], parts[self._scale].to(torch.float32)
        outputs, inputs = codes.shape
        rows, columns = self._block or (outputs if scales.numel() == 1 else 1, inputs)
        expected = (-(-outputs // rows), -(-inputs // columns))
        if scales.numel() != expected[0] * expected[1]:
            raise ModelError(
                f"{self._scale} is {list(scales.shape)}, but a weight of {outputs} x {inputs} in blocks of "
                f"{rows} x {columns} has {expected[0]} x {expected[1]} scales"
            )
        zeros = parts.get("weight_zero_point")
        return QuantizedMatrix(
            codes=codes,
            scales=scales.view(expected),
            zeros=None if zeros is None or not zeros.any() else zeros.to(torch.int16).view(expected),
            block_rows=rows,
            groups=grouped(inputs, columns),
        )


class PackedIntegers:
    """compressed-tensors' "pack-quantized": integers of 4 or 8 bits, moved up by half their range, in words along the
    inputs; zero points likewise, in words along the outputs. `weight_g_idx` names each input's group, if not in order.
    """

    codes = "weight_packed"
    required = frozenset({"weight_packed", "weight_scale", "weight_shape"})
    parts = required | {"weight_zero_point", "weight_g_idx"}

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        outputs, words = shapes["weight_packed"]
        return outputs, words * (WORD_BITS // self._bits)

    def matrix(self, parts: Parts) -> QuantizedMatrix:
        codes = unpacked(parts["weight_packed"], self._bits)
        outputs, inputs = codes.shape
        if parts["weight_shape"].tolist() != [outputs, inputs]:
            raise ModelError(f"weight_packed holds {outputs} x {inputs}, weight_shape is {parts['weight_shape']}")
        scales = parts["weight_scale"].to(torch.float32).view(-1, parts["weight_scale"].shape[-1])
        zeros = torch.full(scales.shape, 1 << (self._bits - 1), dtype=torch.int16)
        if "weight_zero_point" in parts:
            zeros = unpacked(parts["weight_zero_point"].t(), self._bits).t()[: len(scales)].to(torch.int16)
        groups = parts.get("weight_g_idx")
        return QuantizedMatrix(
            codes=codes,
            scales=scales,
            zeros=zeros,
            block_rows=outputs // len(scales),
            groups=grouped(inputs, inputs // scales.shape[1]) if groups is None else groups.to(torch.int64),
        )


class AWQ:
    """AutoAWQ's "gemm" layout: qweight [inputs, outputs / 8], qzeros [groups, outputs / 8], scales [groups, outputs].

    Lin et al., AWQ (2023). A word holds eight neighbouring outputs, not in order: `AWQ_FIELDS`.
    """

    codes = "qweight"
    required = parts = frozenset({"qweight", "qzeros", "scales"})

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        inputs, words = shapes["qweight"]
        return words * (WORD_BITS // AWQ_BITS), inputs

    def matrix(self, parts: Parts) -> QuantizedMatrix:
        codes, zeros = (_awq_outputs(parts[name]) for name in ("qweight", "qzeros"))
        inputs = codes.shape[1]
        return QuantizedMatrix(
            codes=codes,
            scales=parts["scales"].to(torch.float32).t().contiguous(),
            zeros=zeros.to(torch.int16),
            block_rows=1,
            groups=grouped(inputs, inputs // zeros.shape[1]),
        )


class GPTQ:
    """qweight [inputs / fields, outputs], qzeros [groups, outputs / fields], scales [groups, outputs], g_idx [inputs].

    Frantar et al., GPTQ (2022), as AutoGPTQ stores it: g_idx names each input's group, in any order after act-order.
    The first version of the format has one less than the zero points in qzeros, the second the zero points.
    """

    codes = "qweight"
    required = frozenset({"qweight", "qzeros", "scales"})
    parts = required | {"g_idx"}

    def __init__(self, bits: int, group_size: int, version: int) -> None:
        """A `group_size` below 1: all inputs are one group."""
        self._bits = bits
        self._group_size = group_size
        self._version = version

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        words, outputs = shapes["qweight"]
        return outputs, words * (WORD_BITS // self._bits)

    def matrix(self, parts: Parts) -> QuantizedMatrix:
        codes = unpacked(parts["qweight"].t(), self._bits)
        outputs, inputs = codes.shape
        words = parts["qzeros"]
        if self._version == 1:
            # A one in each field at once, carries and all: so it undoes how writers subtract it.
            words = words + sum(1 << shift for shift in range(0, WORD_BITS, self._bits))
        groups = parts.get("g_idx")
        size = self._group_size if self._group_size > 0 else inputs
        return QuantizedMatrix(
            codes=codes,
            scales=parts["scales"].to(torch.float32).t().contiguous(),
            zeros=unpacked(words, self._bits).t()[:outputs].to(torch.int16),
            block_rows=1,
            groups=grouped(inputs, size) if groups is None else groups.to(torch.int64),
        )


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] -> uint8 [rows, words * (32 / bits)]: their fields of 2, 4 or 8 bits."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (octets.unsqueeze(-1) >> shifts).bitwise_and_((1 << bits) - 1).flatten(-2)


def _awq_outputs(words: Tensor) -> Tensor:
    """int32 [rows, outputs / 8] -> uint8 [outputs, rows]"""
    fields = unpacked(words, AWQ_BITS).view(len(words), -1, len(AWQ_FIELDS))
    return fields[..., AWQ_FIELDS].flatten(1).t().contiguous()

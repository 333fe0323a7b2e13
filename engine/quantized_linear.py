"""Products with weights that stay quantised, by torch's own kernels: for GPUs, whose decode steps wait for weights.

Which kernel takes a matrix depends on how it is quantised and on the device. Each one is tried against the dequantised
matrix when it is made; a matrix that no kernel takes, or whose product differs, is kept dequantised. The kernels ran on
CPUs, all but `Float8Blocks`, and none of them on a GPU so far.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor

from cluster.logging import get_logger
from engine.linear import Linear, make_linear, nbytes_of
from engine.weights.quantized.config import FLOAT8_BLOCK, INT4_GROUPS
from engine.weights.quantized.matrix import QuantizedMatrix

log = get_logger(__name__)

FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = 448.0
FLOAT8_ALIGNMENT = 4
INT4_LEVELS = 16
INT4_MIDDLE = 8
INT4_INNER_TILES = 8
"""How many tiles of 16 inputs the int4 kernel for CUDA keeps together."""
INT8_MIDDLE = 128
TRIED_ROWS = (2, 64)
TOLERANCE = 0.06
"""Of the difference to the dequantised product, relative to it (root mean square). FP8 activations give 0.03."""


class Kernel(Protocol):
    """x [rows, inputs] -> [rows, outputs], of one matrix. Called on the step loop's thread."""

    nbytes: int

    def __call__(self, inputs: Tensor) -> Tensor: ...


class Float8Rows:
    """FP8 with a scale per output, or per tensor; activations become FP8 too, with a scale per row."""

    @staticmethod
    def takes(matrix: QuantizedMatrix, dtype: torch.dtype) -> bool:
        outputs, inputs = matrix.codes.shape
        rowwise = matrix.scales.shape[1] == 1 and (matrix.block_rows == 1 or len(matrix.scales) == 1)
        tiled = outputs % 16 == inputs % 16 == 0
        # Hopper; Ada has scales per tensor only.
        return matrix.codes.dtype == FLOAT8 and rowwise and tiled and _reaches(matrix.codes.device, (9, 0))

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        self._codes = matrix.codes.contiguous()
        self._scales = matrix.scales.view(-1).expand(len(matrix.codes)).contiguous().view(1, -1)
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def __call__(self, inputs: Tensor) -> Tensor:
        scale = _float8_scale(inputs.float().abs().amax(-1, keepdim=True))
        codes = (inputs / scale).to(FLOAT8)
        return torch._scaled_mm(codes, self._codes.t(), scale, self._scales, out_dtype=inputs.dtype)


class Float8Blocks:
    """FP8 with a scale per block of 128 x 128 (DeepSeek-V3, arXiv:2412.19437); activations with one per 1 x 128."""

    @staticmethod
    def takes(matrix: QuantizedMatrix, dtype: torch.dtype) -> bool:
        square = matrix.block_rows == FLOAT8_BLOCK == matrix.group_size
        whole = all(size % FLOAT8_BLOCK == 0 for size in matrix.codes.shape)
        device = matrix.codes.device
        return matrix.codes.dtype == FLOAT8 and square and whole and device.type == "cuda" and _reaches(device, (9, 0))

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        self._codes = matrix.codes.contiguous()
        # Each row of blocks begins at a multiple of so many scales.
        self._scales = functional.pad(matrix.scales, (0, -matrix.scales.shape[1] % FLOAT8_ALIGNMENT)).contiguous()
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def __call__(self, inputs: Tensor) -> Tensor:
        pieces = inputs.view(len(inputs), -1, FLOAT8_BLOCK)
        scale = _float8_scale(pieces.float().abs().amax(-1))
        codes = (pieces / scale[..., None]).to(FLOAT8).view(inputs.shape)
        product: Tensor = functional.scaled_mm(
            codes,
            self._codes.t(),
            # The kernel reads the scales of a column of blocks one after the other.
            scale.t().contiguous().t(),
            functional.ScalingType.BlockWise1x128,
            self._scales.t(),
            functional.ScalingType.BlockWise128x128,
            output_dtype=inputs.dtype,
        )
        return product


class Int4Groups:
    """Integers of four bits in groups of neighbouring inputs: AWQ, GPTQ without act-order, compressed-tensors.

    The kernel's weights are (code - 8) * scale + offset, with scale and offset of the activations' dtype: in bfloat16
    scales lose three of the eleven bits that they have in checkpoints.
    """

    @staticmethod
    def takes(matrix: QuantizedMatrix, dtype: torch.dtype) -> bool:
        outputs, inputs = matrix.codes.shape
        device = matrix.codes.device
        four_bits = matrix.codes.dtype == torch.uint8 and int(matrix.codes.max()) < INT4_LEVELS
        grouped = matrix.block_rows == 1 and matrix.group_size in INT4_GROUPS
        tiled = outputs % 16 == 0 and inputs % (16 * INT4_INNER_TILES) == 0
        computed = device.type == "cpu" or dtype == torch.bfloat16
        return four_bits and grouped and tiled and computed and _reaches(device, (8, 0))

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        operators = torch.ops.aten
        self._group = matrix.group_size
        if matrix.codes.device.type == "cpu":
            self._codes = operators._convert_weight_to_int4pack_for_cpu(matrix.codes.to(torch.int32), 1)
            self._product = operators._weight_int4pack_mm_for_cpu.default
        else:
            pairs = (matrix.codes[:, ::2] << 4) | matrix.codes[:, 1::2]
            self._codes = operators._convert_weight_to_int4pack(pairs.contiguous(), INT4_INNER_TILES)
            self._product = operators._weight_int4pack_mm.default
        zeros = torch.zeros_like(matrix.scales) if matrix.zeros is None else matrix.zeros
        offsets = (INT4_MIDDLE - zeros) * matrix.scales
        self._scales = torch.stack((matrix.scales, offsets), -1).transpose(0, 1).to(dtype).contiguous()
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def __call__(self, inputs: Tensor) -> Tensor:
        product: Tensor = self._product(inputs.contiguous(), self._codes, self._group, self._scales)
        return product


class Int8Rows:
    """Integers of eight bits with a scale per output, or per tensor; activations stay as they are."""

    @staticmethod
    def takes(matrix: QuantizedMatrix, dtype: torch.dtype) -> bool:
        rowwise = matrix.scales.shape[1] == 1 and (matrix.block_rows == 1 or len(matrix.scales) == 1)
        return rowwise and _signed(matrix) is not None and _reaches(matrix.codes.device, (8, 0))

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype) -> None:
        codes = _signed(matrix)
        assert codes is not None
        self._codes = codes.contiguous()
        self._scales = matrix.scales.view(-1).expand(len(codes)).to(dtype).contiguous()
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def __call__(self, inputs: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(inputs.contiguous(), self._codes, self._scales)


KERNELS = (Float8Rows, Float8Blocks, Int4Groups, Int8Rows)


class QuantizedLinear:
    """Implements `Linear` over a kernel."""

    def __init__(self, kernel: Kernel, bias: Tensor | None) -> None:
        self.kernel = kernel
        self._bias = bias
        self.nbytes = kernel.nbytes + nbytes_of(bias)

    def __call__(self, inputs: Tensor) -> Tensor:
        product = self.kernel(inputs)
        return product if self._bias is None else product.add_(self._bias)

    def add_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        return self(inputs).add_(residual)


def make_quantized_linear(matrix: QuantizedMatrix, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    """The product with `matrix`, on its device, for inputs of `dtype`; dequantised if no kernel will do."""
    weight = matrix.dequantized().to(dtype)
    for kind in KERNELS:
        if kind.takes(matrix, dtype):
            kernel = kind(matrix, dtype)
            if _agrees(kernel, weight):
                return QuantizedLinear(kernel, bias)
    return make_linear(weight, bias)


def _agrees(kernel: Kernel, weight: Tensor) -> bool:
    """Whether it computes what it should, and computes at all: not every build of torch has every kernel."""
    generator = torch.Generator().manual_seed(0)
    for rows in TRIED_ROWS:
        inputs = torch.randn(rows, weight.shape[1], generator=generator).to(weight)
        expected = functional.linear(inputs, weight).float()
        try:
            difference = kernel(inputs).float() - expected
        except (RuntimeError, ValueError) as error:
            log.warning("a kernel for quantised weights fails", kernel=type(kernel).__name__, error=str(error))
            return False
        if not difference.square().mean().sqrt() <= TOLERANCE * expected.square().mean().sqrt():
            log.warning("a kernel for quantised weights computes something else", kernel=type(kernel).__name__)
            return False
    return True


def _signed(matrix: QuantizedMatrix) -> Tensor | None:
    """Codes as int8, where zero points allow."""
    if matrix.codes.dtype == torch.int8 and matrix.zeros is None:
        return matrix.codes
    if matrix.codes.dtype == torch.uint8 and matrix.zeros is not None and bool((matrix.zeros == INT8_MIDDLE).all()):
        return (matrix.codes.to(torch.int16) - INT8_MIDDLE).to(torch.int8)
    return None


def _float8_scale(largest: Tensor) -> Tensor:
    """float32, never 0."""
    return (largest / LARGEST_FLOAT8).clamp_(min=torch.finfo(torch.float32).tiny)


def _reaches(device: torch.device, capability: tuple[int, int]) -> bool:
    """Whether a GPU is of this generation; a CPU does what torch has for it."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= capability

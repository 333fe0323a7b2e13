"""Products with quantised weights on a GPU: which of torch's kernels take part, and that they compute the product."""

from __future__ import annotations

import pytest
import torch

from engine.quantized_linear import (
    Float8Blocks,
    Float8Rows,
    Int4Groups,
    Int8Rows,
    QuantizedLinear,
    make_quantized_linear,
)
from engine.weights.quantized.matrix import QuantizedMatrix, grouped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OUTPUTS, INPUTS = 512, 1024


def matrix(codes, rows, columns, zeros=None):
    shape = (OUTPUTS // rows, INPUTS // columns)
    of = None if zeros is None else torch.full(shape, zeros, dtype=torch.int16)
    return QuantizedMatrix(codes, torch.rand(shape) + 0.1, of, rows, grouped(INPUTS, columns))


def float8():
    return torch.randn(OUTPUTS, INPUTS).to(torch.float8_e4m3fn)


def integers(levels):
    return torch.randint(0, levels, (OUTPUTS, INPUTS), dtype=torch.uint8)


MATRICES = {
    "FP8 per tensor": (lambda: matrix(float8(), OUTPUTS, INPUTS), Float8Rows),
    "FP8 per output": (lambda: matrix(float8(), 1, INPUTS), Float8Rows),
    "FP8 in blocks": (lambda: matrix(float8(), 128, 128), Float8Blocks),
    "int4": (lambda: matrix(integers(16), 1, 128, zeros=7), Int4Groups),
    "int8": (lambda: matrix(integers(256), 1, INPUTS, zeros=128), Int8Rows),
}


@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("name", MATRICES)
def test_kernels_compute_the_dequantised_product(name, rows):
    make, kernel = MATRICES[name]
    torch.manual_seed(0)
    quantised = make().to(torch.device("cuda"))
    linear = make_quantized_linear(quantised, None, torch.bfloat16)
    assert isinstance(linear, QuantizedLinear), "no kernel of this GPU, or it computes something else: see the log"
    assert isinstance(linear.kernel, kernel)
    inputs = torch.randn(rows, INPUTS, dtype=torch.bfloat16, device="cuda")
    expected = inputs.float() @ quantised.dequantized().t()
    assert (linear(inputs).float() - expected).norm() < 0.05 * expected.norm()

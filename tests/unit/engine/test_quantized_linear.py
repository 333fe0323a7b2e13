"""Products with quantised weights: what torch's kernels make of our form of a matrix, and what happens without them."""

from __future__ import annotations

import pytest
import torch

from cluster.config import WeightsFrom
from engine.group import ThreadGroup, ThreadMeeting
from engine.linear import PackedLinear
from engine.quantized_linear import Float8Rows, Int4Groups, Int8Rows, QuantizedLinear, make_quantized_linear
from engine.shard import Shard, ShardedWeights
from engine.weights import open_model
from engine.weights.layers import PROJECTIONS, read_projection, read_quantized
from engine.weights.quantized.matrix import QuantizedMatrix, grouped
from tests.unit.engine.quantized_folders import FORMATS, write
from tests.unit.engine.tiny import MODELS, make_model

OUTPUTS, INPUTS, GROUP = 96, 256, 64


def matrix(kind, *, act_order=False):
    generator = torch.Generator().manual_seed(0)
    rows, groups = (OUTPUTS, INPUTS // GROUP) if kind == "int4" else (1 if kind == "float8" else OUTPUTS, 1)
    scales = torch.rand(rows, groups, generator=generator) + 0.1
    size = (OUTPUTS, INPUTS)
    zeros = None
    if kind == "float8":
        codes = torch.randn(size, generator=generator).to(torch.float8_e4m3fn)
    elif kind == "int4":
        codes = torch.randint(0, 16, size, generator=generator, dtype=torch.uint8)
        zeros = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.int16)
    else:
        codes = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        zeros = torch.full(scales.shape, 128, dtype=torch.int16)
    of = grouped(INPUTS, INPUTS // groups)
    return QuantizedMatrix(codes, scales, zeros, OUTPUTS // rows, of.flip(0) if act_order else of)


@pytest.mark.parametrize(
    ("kind", "kernel", "tolerance"),
    [("float8", Float8Rows, 0.05), ("int4", Int4Groups, 1e-5), ("int8", Int8Rows, 1e-5)],
)
def test_kernels_compute_the_dequantised_product(kind, kernel, tolerance):
    quantised, bias = matrix(kind), torch.randn(OUTPUTS)
    linear = make_quantized_linear(quantised, bias, torch.float32)
    assert isinstance(linear, QuantizedLinear)
    assert isinstance(linear.kernel, kernel)
    assert linear.nbytes < OUTPUTS * INPUTS * 1.1
    inputs, residual = torch.randn(7, INPUTS), torch.randn(7, OUTPUTS)
    expected = inputs @ quantised.dequantized().t() + bias
    for found, wanted in ((linear(inputs), expected), (linear.add_to(residual, inputs), expected + residual)):
        assert (found - wanted).norm() < tolerance * wanted.norm()


def test_without_a_kernel_the_matrix_is_dequantised():
    """Of act-order's groups there is none."""
    quantised = matrix("int4", act_order=True)
    linear = make_quantized_linear(quantised, None, torch.float32)
    assert isinstance(linear, PackedLinear)
    inputs = torch.randn(4, INPUTS)
    torch.testing.assert_close(linear(inputs), inputs @ quantised.dequantized().t(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("defect", ["wrong", "not a number", "fails"])
def test_a_kernel_that_does_not_compute_the_product_is_not_used(defect, monkeypatch):
    def broken(self, inputs):
        if defect == "fails":
            raise RuntimeError("no kernel image is available")
        return inputs.new_full((len(inputs), OUTPUTS), torch.nan if defect == "not a number" else 1.0)

    monkeypatch.setattr(Int8Rows, "__call__", broken)
    assert isinstance(make_quantized_linear(matrix("int8"), None, torch.float32), PackedLinear)


@pytest.mark.parametrize("name", ["fp8 in blocks", "fp8 per tensor", "compressed int8", "awq", "gptq"])
def test_what_a_layer_multiplies_with_is_the_same_quantised(name, tmp_path):
    """Whole, and as the ranks of a group have it, whose heads and blocks don't come out even."""
    with torch.no_grad():
        write(make_model(MODELS["llama"]), tmp_path, FORMATS[name])
    config, whole = open_model(tmp_path, WeightsFrom.FILES)
    parts = [Shard(config, ThreadGroup(ThreadMeeting(3), rank)) for rank in range(3)]
    cases = [(config, whole), *((part.config, ShardedWeights(whole, part)) for part in parts)]
    for config, weights in cases:
        for product in PROJECTIONS:
            found = read_quantized(weights, 1, product)
            assert torch.equal(found.dequantized(), read_projection(config, weights.read, 1, product).weight)

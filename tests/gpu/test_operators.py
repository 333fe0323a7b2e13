"""flashinfer's operators, and compiled ones, on a GPU against torch's."""

from __future__ import annotations

import pytest
import torch

from cluster.layout import KVLayout
from engine.attention.flashinfer_paged import open_flashinfer
from engine.kv_cache import KVCache
from engine.model_config import RopeConfig
from engine.operators.flashinfer_operators import FlashInferOperators, disagreement
from engine.operators.nucleus import FlashInferNucleus, disagrees
from engine.operators.torch_operators import CompiledOperators
from engine.rope import RotaryEmbedding

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(900),
    # torch's own, as it imports its compiler.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

GPU = torch.device("cuda", 0)
EPSILON = 1e-5


def flashinfers(head_dim, dtype):
    layout = KVLayout("m", str(dtype).removeprefix("torch."), 16, 1, 1, head_dim)
    return FlashInferOperators(EPSILON, open_flashinfer(KVCache(layout, 1, GPU, dtype)))


@pytest.mark.parametrize("vocabulary", [1000, 49_152, 151_936])
def test_flashinfers_nucleus_is_the_samplers(vocabulary):
    cache = KVCache(KVLayout("m", "bfloat16", 16, 1, 1, 64), 1, GPU, torch.bfloat16)
    assert not disagrees(FlashInferNucleus(open_flashinfer(cache)), vocabulary, GPU)


def compiled(head_dim, dtype):
    return CompiledOperators(EPSILON)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("make", [flashinfers, compiled])
def test_operators_compute_what_torchs_do(make, head_dim, dtype):
    rope = RotaryEmbedding(RopeConfig(theta=10000.0), head_dim, GPU)
    assert disagreement(make(head_dim, dtype), EPSILON, rope, head_dim, GPU, dtype) is None

"""flashinfer's kernels on a GPU against the formula, at the edges of pages and chunks and with sliding windows."""

from __future__ import annotations

import pytest
import torch

from engine.attention.flashinfer_paged import FlashInferAttention, open_flashinfer
from engine.attention.torch_paged import TorchPagedAttention
from tests.unit.engine.attention_bench import Bench, Place

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(900)]

GPU = torch.device("cuda", 0)
PLACES = {
    # A value near 1 is off by 1/256 in bfloat16, and by 1/2048 in float16; weights are rounded as values are.
    "bfloat16": Place(GPU, torch.bfloat16, 64, 2e-2),
    "float16, large heads": Place(GPU, torch.float16, 128, 4e-3),
}


def flashinfer(cache, heads, windows):
    return FlashInferAttention(cache, heads, windows, open_flashinfer(cache))


@pytest.fixture(params=[flashinfer, TorchPagedAttention], ids=["flashinfer", "torch"])
def make(request):
    return request.param


@pytest.mark.parametrize("stored", ["as computed", "float8_e4m3fn"])
@pytest.mark.parametrize("name", PLACES)
def test_prompts_in_chunks_beside_decodes(name, stored, make):
    place = PLACES[name]
    kept = stored if stored.startswith("float8") else str(place.dtype).removeprefix("torch.")
    bench = Bench(make, 16, windows=(None, 9, None), stored=kept, place=place)
    bench.step(long=70, short=3, page=16, more=17)
    bench.step(short=1, long=65, page=1, more=1)
    bench.step(short=1, long=1, late=130)
    for _ in range(17):
        bench.step(late=1, short=1, long=1, page=1)

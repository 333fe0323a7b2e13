"""The operators of each library against torch's, and how they are chosen."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch

from cluster.config import Attention, Kernels
from cluster.layout import KVLayout
from engine import torch_decoder
from engine.kv_cache import KVCache
from engine.model_config import RopeConfig
from engine.operators import choice, nucleus
from engine.operators.choice import make_operators
from engine.operators.flashinfer_operators import FlashInferOperators, disagreement
from engine.operators.nucleus import FlashInferNucleus, disagrees, make_nucleus
from engine.operators.torch_operators import CompiledOperators, TorchOperators
from engine.rope import RotaryEmbedding
from engine.sampler import nucleus_by_sorting
from tests.unit.engine.fake_flashinfer import FakeFlashInfer
from tests.unit.engine.tiny import MODELS, make_engine, make_model, prompts, run, sequence

CPU = torch.device("cpu")
EPSILON = 1e-5
HEAD_DIM = 64
ROPE = RotaryEmbedding(RopeConfig(theta=10000.0), HEAD_DIM, CPU)


class Wrong(FakeFlashInfer):
    """Takes the halves of the gates for each other."""

    def silu_and_mul(self, input):
        return super().silu_and_mul(input.roll(input.shape[-1] // 2, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_flashinfers_operators_compute_what_torchs_do(dtype):
    operators = FlashInferOperators(EPSILON, FakeFlashInfer())
    assert disagreement(operators, EPSILON, ROPE, HEAD_DIM, CPU, dtype) is None


def test_an_operator_that_computes_something_else_is_found():
    assert (
        disagreement(FlashInferOperators(EPSILON, Wrong()), EPSILON, ROPE, HEAD_DIM, CPU, torch.float32) == "silu_mul"
    )


def test_compiled_operators_are_torchs_traced_without_a_break(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    assert disagreement(CompiledOperators(EPSILON), EPSILON, ROPE, HEAD_DIM, CPU, torch.float32) is None


@pytest.mark.parametrize("family", ["llama, tied, biases, head_dim of its own", "qwen3"])
def test_a_model_computes_the_same_tokens_with_flashinfers_operators(family, tmp_path, monkeypatch):
    make_model(MODELS[family]).save_pretrained(tmp_path)
    asked = prompts(1, 17, 40)

    def answers():
        engine = make_engine(tmp_path, kernels=Kernels.TORCH)
        return run(engine, *(sequence(number, prompt, 12) for number, prompt in enumerate(asked)))

    expected, library = answers(), FakeFlashInfer()
    monkeypatch.setattr(
        torch_decoder, "make_operators", lambda *settings, **named: FlashInferOperators(EPSILON, library)
    )
    assert answers() == expected
    assert {call.method for call in library.calls} == {
        "rmsnorm", "fused_add_rmsnorm", "apply_rope_with_cos_sin_cache_inplace", "silu_and_mul",
    }  # fmt: skip


def test_a_cpu_has_torchs_whatever_is_wanted_and_compiled_if_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    cache = KVCache(KVLayout("m", "float32", 4, 1, 1, HEAD_DIM), 1, CPU)
    config = type("Config", (), {"norm_epsilon": EPSILON, "head_dim": HEAD_DIM})
    for wanted in Attention:
        assert isinstance(make_operators(wanted, cache, config, ROPE, compiled=False), TorchOperators)
    assert isinstance(make_operators(Attention.AUTO, cache, config, ROPE, compiled=True), CompiledOperators)


@pytest.mark.parametrize("library", [Wrong, FakeFlashInfer])
def test_a_gpu_has_flashinfers_where_they_agree_with_torchs(library, monkeypatch):
    """As if this CPU were one."""
    cache = KVCache(KVLayout("m", "float32", 4, 1, 1, HEAD_DIM), 1, CPU)
    config = type("Config", (), {"norm_epsilon": EPSILON, "head_dim": HEAD_DIM})
    device = type("Device", (), {"type": "cuda"})
    monkeypatch.setattr(choice, "open_flashinfer", lambda cache: library())
    monkeypatch.setattr(choice, "disagreement", lambda *settings: disagreement(*settings[:4], CPU, cache.dtype))
    claimed = type("Cache", (), {"pool": type("Pool", (), {"device": device}), "dtype": cache.dtype})
    chosen = make_operators(Attention.AUTO, claimed, config, ROPE, compiled=False)
    assert isinstance(chosen, TorchOperators if library is Wrong else FlashInferOperators)
    assert isinstance(make_operators(Attention.TORCH, claimed, config, ROPE, compiled=False), TorchOperators)


class Greedy(FakeFlashInfer):
    """Leaves the most likely token only."""

    def top_p_renorm_probs(self, probs, top_p, is_deterministic=False):
        return super().top_p_renorm_probs(probs, top_p * 1e-6, is_deterministic)


def test_flashinfers_nucleus_is_the_samplers():
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(20, 4000, generator=generator) * torch.linspace(0.0, 6.0, 20)[:, None]).softmax(-1)
    find = FlashInferNucleus(FakeFlashInfer())
    for share in (0.0, 0.3, 0.95):
        mass = torch.full((20, 1), share, dtype=torch.float64)
        assert torch.equal(find(rows, mass), nucleus_by_sorting(rows, mass))


def test_a_nucleus_is_used_where_it_agrees_with_the_samplers(monkeypatch):
    assert not disagrees(FlashInferNucleus(FakeFlashInfer()), 500, CPU)
    assert disagrees(FlashInferNucleus(Greedy()), 500, CPU)
    cache = KVCache(KVLayout("m", "float32", 4, 1, 1, HEAD_DIM), 1, CPU)
    assert make_nucleus(Attention.AUTO, cache, 500) is None
    claimed = type("Cache", (), {"pool": type("Pool", (), {"device": type("Device", (), {"type": "cuda"})})})
    monkeypatch.setattr(nucleus, "disagrees", lambda tried, vocabulary, device: disagrees(tried, vocabulary, CPU))
    for library, expected in ((FakeFlashInfer, FlashInferNucleus), (Greedy, type(None))):
        monkeypatch.setattr(nucleus, "open_flashinfer", lambda cache, library=library: library())
        assert isinstance(make_nucleus(Attention.AUTO, claimed, 500), expected)
        assert make_nucleus(Attention.TORCH, claimed, 500) is None


def test_the_library_takes_what_it_is_given():
    """Where flashinfer is installed: its functions have parameters of these names, in this order."""
    real = pytest.importorskip("flashinfer")
    library = FakeFlashInfer()
    disagreement(FlashInferOperators(EPSILON, library), EPSILON, ROPE, HEAD_DIM, CPU, torch.float32)
    disagrees(FlashInferNucleus(library), 50, CPU)
    for call in library.calls:
        inspect.signature(getattr(real, call.method)).bind(*call.arguments, **call.settings)

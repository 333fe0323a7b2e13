"""How flashinfer is used: what is planned once, what nested steps have, and who computes where there is none."""

from __future__ import annotations

import inspect

import pytest
import torch

from cluster.config import Attention
from cluster.layout import KVLayout
from engine.attention import flashinfer_paged
from engine.attention.base import Span
from engine.attention.choice import make_attention
from engine.attention.flashinfer_paged import FlashInferAttention, FlashInferUnavailable
from engine.attention.torch_paged import TorchPagedAttention
from engine.kv_cache import KVCache
from tests.unit.engine.fake_flashinfer import FakeFlashInfer

HEADS, LAYERS = 8, 3
LAYOUT = KVLayout("m", "float32", 4, LAYERS, 2, 64)
WINDOWS = (None, 5, None)
SPANS = [Span(0, 6, 7, [3, 1]), Span(1, 2, 9, [5, 2, 0]), Span(8, 0, 1, [4])]


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, heads, LAYOUT.head_dim, generator=generator) for heads in (HEADS, 2, 2))


@pytest.fixture
def library():
    return FakeFlashInfer()


@pytest.fixture
def cache():
    return KVCache(LAYOUT, 8, torch.device("cpu"))


def test_a_step_is_planned_once_and_its_layers_run_over_the_pool_itself(library, cache):
    backend = FlashInferAttention(cache, HEADS, WINDOWS, library, workspace_bytes=0)
    step = backend.plan(SPANS, 9)
    for layer in range(LAYERS):
        step.attend(layer, *rows(9, layer))
    plans = [call for call in library.calls if call.method == "plan"]
    # Decode and prefill, each for layers with and without a window; a window of 5 is four tokens before the query.
    assert sorted((call.wrapper[5:12], call.settings["window_left"]) for call in plans) == [
        ("DecodeW", -1), ("DecodeW", 4), ("Prefill", -1), ("Prefill", 4),
    ]  # fmt: skip
    prefill = next(call for call in plans if "Prefill" in call.wrapper)
    assert [argument.tolist() for argument in prefill.arguments[:4]] == [[0, 7], [0, 3], [5, 2, 0], [1]]
    decode = next(call for call in plans if "Decode" in call.wrapper)
    assert [argument.tolist() for argument in decode.arguments[:3]] == [[0, 2, 3], [3, 1, 4], [3, 1]]
    runs = [call for call in library.calls if call.method == "run"]
    assert len(runs) == 2 * LAYERS
    pool = range(cache.address, cache.address + cache.nbytes)
    assert all(part.data_ptr() in pool for call in runs for part in call.arguments[1])


def test_a_step_between_the_layers_of_another_changes_neither(library, cache):
    """As when a short prompt overtakes; after it, wrappers are used again."""
    backend = FlashInferAttention(cache, HEADS, (None,) * LAYERS, library, workspace_bytes=0)
    reference = TorchPagedAttention(KVCache(LAYOUT, 8, torch.device("cpu")), HEADS, (None,) * LAYERS)
    overtaking = [Span(0, 0, 3, [6]), Span(3, 0, 1, [7])]

    def interleaved(attention):
        outer, found = attention.plan(SPANS, 9), []
        for layer in range(LAYERS):
            found.append(outer.attend(layer, *rows(9, layer)))
            inner = attention.plan(overtaking, 4)
            found += [inner.attend(each, *rows(4, 10 + each)) for each in range(LAYERS)]
        return found

    for _ in range(2):
        for found, expected in zip(interleaved(backend), interleaved(reference), strict=True):
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert library.made == 4


def test_a_fixed_number_of_sequences_is_computed_from_memory_that_stays(library, cache):
    """One after the other, as a graph's kernels find them; and for a step between, of other sequences."""
    backend = FlashInferAttention(cache, HEADS, WINDOWS, library, workspace_bytes=0)
    plain = FlashInferAttention(KVCache(LAYOUT, 8, torch.device("cpu")), HEADS, WINDOWS, library, workspace_bytes=0)
    larger, smaller = backend.fixed(3, 16), backend.fixed(2, 16)
    steps = [
        (larger, [Span(0, 6, 7, [3, 1]), Span(1, 0, 1, [4]), Span(2, 13, 14, [0, 2, 5, 6])]),
        (smaller, [Span(0, 1, 2, [4]), Span(1, 7, 8, [3, 1])]),
        (larger, [Span(0, 8, 9, [3, 1, 7]), Span(1, 2, 3, [4]), Span(2, 14, 15, [0, 2, 5, 6])]),
    ]
    for number, (fixed, spans) in enumerate(steps):
        fixed.place(spans)
        expected = plain.plan(spans, len(spans))
        for layer in range(LAYERS):
            given = rows(len(spans), 10 * number + layer)
            torch.testing.assert_close(fixed.attend(layer, *given), expected.attend(layer, *given))
    with pytest.raises(AssertionError):
        larger.place(steps[1][1])


def test_a_wrapper_is_not_planned_again_before_its_last_plan_has_left(library, cache, monkeypatch):
    class Mark:
        def __init__(self, device):
            pass

        def wait(self):
            library.record("", "wait", (), {})

        def set(self):
            library.record("", "set", (), {})

    monkeypatch.setattr(flashinfer_paged, "Mark", Mark)
    backend = FlashInferAttention(cache, HEADS, (None,) * LAYERS, library, workspace_bytes=0)
    fixed = backend.fixed(1, 16)
    for _ in range(2):
        step = backend.plan(SPANS, 9)
        for layer in range(LAYERS):
            step.attend(layer, *rows(9, layer))
        fixed.place([Span(0, 1, 2, [4])])
    calls = [call.method for call in library.calls if call.method in ("wait", "plan", "set")]
    assert calls == ["wait", "plan", "plan", "set", "wait", "plan", "set"] * 2


def test_decode_uses_tensor_cores_where_many_heads_share_keys(library, cache):
    for heads in (8, 6):
        FlashInferAttention(cache, heads, (None,) * LAYERS, library, workspace_bytes=0).warm_up(0, 100)
    made = [call for call in library.calls if call.method == "__init__" and "Decode" in call.wrapper]
    assert [call.settings["use_tensor_cores"] for call in made] == [True, False]
    # What is compiled at the first use is compiled by then: both kinds of kernels have run.
    assert {call.wrapper for call in library.calls if call.method == "run"} == {call.wrapper for call in library.calls}


def test_without_a_gpu_torch_attends_unless_flashinfer_is_asked_for(cache):
    for wanted in (Attention.AUTO, Attention.TORCH):
        assert isinstance(make_attention(wanted, cache, HEADS, WINDOWS), TorchPagedAttention)
    with pytest.raises(FlashInferUnavailable, match="flashinfer computes on CUDA, not on cpu"):
        make_attention(Attention.FLASHINFER, cache, HEADS, WINDOWS)


def test_the_library_takes_what_it_is_given(library, cache):
    """Where flashinfer is installed: its methods have parameters of these names and in this order."""
    real = pytest.importorskip("flashinfer")
    backend = FlashInferAttention(cache, HEADS, WINDOWS, library, workspace_bytes=0)
    step = backend.plan(SPANS, 9)
    for layer in range(LAYERS):
        step.attend(layer, *rows(9, layer))
    fixed = backend.fixed(1, 16)
    fixed.place([Span(0, 1, 2, [4])])
    fixed.attend(0, *rows(1, 0))
    assert {call.method for call in library.calls} == {"__init__", "plan", "run"}
    for call in library.calls:
        wrapper = getattr(real, call.wrapper)
        # Decode's `plan` takes any settings, and gives them to another method.
        method = (
            getattr(wrapper, "_plan_impl", wrapper.plan) if call.method == "plan" else getattr(wrapper, call.method)
        )
        inspect.signature(method).bind(None, *call.arguments, **call.settings)

"""Paged attention against the formula, sequence by sequence and query by query."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.base import Span
from engine.attention.flashinfer_paged import FlashInferAttention
from engine.attention.grouping import PADDED_KEYS, Extent, group_by_extent
from engine.attention.slots import Slots
from engine.attention.torch_paged import TorchPagedAttention
from tests.unit.engine.attention_bench import Bench
from tests.unit.engine.fake_flashinfer import FakeFlashInfer


def flashinfer(cache, heads, windows):
    """Over a library that computes on a CPU."""
    return FlashInferAttention(cache, heads, windows, FakeFlashInfer(), workspace_bytes=0)


BACKENDS = {"torch": TorchPagedAttention, "flashinfer": flashinfer}


@pytest.fixture(params=BACKENDS)
def make(request):
    return BACKENDS[request.param]


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_prompts_of_lengths_around_pages_then_decode(page_size, make):
    bench = Bench(make, page_size)
    bench.step(a=page_size, b=page_size + 1, c=max(1, page_size - 1), d=1, e=3 * page_size + 2)
    for _ in range(page_size + 2):
        bench.step(a=1, b=1, c=1, d=1, e=1)


def test_a_prompt_in_chunks_beside_decodes(make):
    bench = Bench(make, 8)
    bench.step(long=70, short=3)
    bench.step(short=1, long=65)
    bench.step(short=1, long=1, late=130)
    bench.step(late=2, short=1, long=1)


@pytest.mark.parametrize("window", [1, 5, 16, 33])
def test_a_sliding_window_in_some_layers(window, make):
    bench = Bench(make, 8, windows=(window, None, window))
    bench.step(a=40, b=7, c=17)
    bench.step(a=30, b=1, c=1)
    for _ in range(9):
        bench.step(a=1, b=1, c=1)


def test_keys_and_values_of_eight_bits(make):
    """What is attended to is what eight bits keep, to the accuracy of float32."""
    bench = Bench(make, 8, windows=(None, 5, None), stored="float8_e4m3fn")
    bench.step(long=70, short=3)
    bench.step(short=1, long=9)
    bench.step(short=1, long=1)


def test_what_eight_bits_cannot_say_is_the_largest_that_they_can():
    pool = torch.zeros(2, 4, 1, 2, dtype=torch.float8_e4m3fn)
    rows = torch.tensor([[[1e6, -1e6]]])
    Slots.of([Span(0, 5, 6, [0, 1])], 4, torch.device("cpu")).write(pool, pool, rows, rows)
    assert pool[1, 1, 0].float().tolist() == [448.0, -448.0]


def test_very_different_lengths_are_several_groups_and_come_back_in_order():
    assert group_by_extent([Extent(1, keys) for keys in (1500, 20, 700, 30)]) == [[0], [2], [3, 1]]
    bench = Bench(TorchPagedAttention, 16)
    bench.step(a=20, b=700, c=30, d=1)
    bench.step(a=1, b=1, c=1, d=1)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=1, max_size=4).filter(
        lambda steps: all(any(step) for step in steps)
    ),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([None, 2, 9]),
    st.sampled_from(list(BACKENDS)),
)
def test_any_mix_of_chunks(steps, page_size, window, name):
    bench = Bench(BACKENDS[name], page_size, windows=(None, window, window), seed=len(steps))
    for step in steps:
        bench.step(**{name: count for name, count in zip("abc", step, strict=True) if count})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.builds(Extent, st.sampled_from([1, 1, 1, 7, 64, 512]), st.integers(1, 9000)), max_size=40))
def test_groups_hold_everyone_once_and_pad_little(extents):
    groups = group_by_extent(extents)
    assert sorted(index for group in groups for index in group) == list(range(len(extents)))
    for group in groups:
        keys = [extents[index].keys for index in group]
        assert len(group) * max(keys) - sum(keys) <= PADDED_KEYS


def test_equal_decodes_are_one_group():
    assert group_by_extent([Extent(1, 320)] * 32) == [list(range(32))]

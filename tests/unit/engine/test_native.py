"""The native kernels against torch's operators, and what they promise beyond them: the same bits in any company."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config import Dtype, Kernels
from cluster.layout import KVLayout
from engine.attention.base import Span
from engine.decoder import Step
from engine.decoders import make_decoder
from engine.kv_cache import KVCache
from engine.model_config import ModelConfig, RopeConfig
from engine.native import library
from engine.native.decoder import NativeDecoder
from engine.native.library import NativeUnavailable
from engine.native.packing import packed, packed_pairs
from engine.torch_decoder import TorchDecoder
from engine.weights.base import identity_of, parameter_shapes

PAGES = 120
VOCABULARY = 101

SHAPES = {
    "plain": {},
    "many heads share keys, odd sizes": {"hidden_size": 36, "intermediate_size": 50, "heads": 10, "kv_heads": 1},
    "large heads": {"heads": 2, "kv_heads": 2, "head_dim": 256},
    "heads of 80, biases, norms of queries": {
        "head_dim": 80, "qkv_bias": True, "output_bias": True, "mlp_bias": True, "query_key_norm": True,
    },
    "a window": {"windows": (None, 21)},
}  # fmt: skip


class RandomWeights:
    """Implements `Weights`; norms and biases are random too, sizes such that logits are."""

    def __init__(self, config):
        self._shapes = parameter_shapes(config)
        self.identity = identity_of(config)

    def shapes(self):
        return self._shapes

    def read(self, name, part=None):
        whole = self._whole(name)
        return whole if part is None else part.of(whole)

    def _whole(self, name):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        values = torch.randn(self._shapes[name], generator=generator)
        return 1 + values / 4 if "norm" in name else values / math.sqrt(values.shape[-1])


def config_of(**changes):
    sizes = {
        "family": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "layers": 2,
        "heads": 6, "kv_heads": 2, "head_dim": 16, "context_length": 512, "norm_epsilon": 1e-5, "rope": RopeConfig(),
        "tied_embeddings": False, "windows": (None, None),
    }  # fmt: skip
    return ModelConfig(**sizes | changes)


def cache_of(config, dtype, page_size):
    layout = KVLayout("m", dtype.value, page_size, config.layers, config.kv_heads, config.head_dim)
    cache = KVCache(layout, PAGES, torch.device("cpu"))
    cache.pool.fill_(math.nan)
    return cache


class Sequences:
    """Tokens and scattered pages of some sequences, and how far each is computed."""

    def __init__(self, page_size, count=6, longest=260, seed=0):
        draw = random.Random(seed)
        free = list(range(PAGES))
        draw.shuffle(free)
        self.tokens = [[draw.randrange(VOCABULARY) for _ in range(longest)] for _ in range(count)]
        needed = -(-longest // page_size)
        self.pages = [[free.pop() for _ in range(needed)] for _ in range(count) if len(free) >= needed]
        self.done = [0] * len(self.pages)

    def step(self, counts):
        """The next `counts[sequence]` tokens of each sequence; all of them are sampled at their last row."""
        tokens, positions, spans, sampled = [], [], [], []
        for sequence, count in counts.items():
            start = self.done[sequence]
            spans.append(Span(len(tokens), start, start + count, self.pages[sequence]))
            tokens += self.tokens[sequence][start : start + count]
            positions += range(start, start + count)
            sampled.append(len(tokens) - 1)
            self.done[sequence] = start + count
        return Step(np.array(tokens), np.array(positions), spans, np.array(sampled))


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("page_size", [3, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_float32_logits_are_those_of_torch(name, page_size):
    config = config_of(**SHAPES[name])
    decoders = [
        make_decoder(kernels, config, RandomWeights(config), cache_of(config, Dtype.FLOAT32, page_size), threads=1)
        for kernels in (Kernels.NATIVE, Kernels.TORCH)
    ]
    assert [type(decoder) for decoder in decoders] == [NativeDecoder, TorchDecoder]
    sequences = Sequences(page_size, count=3, longest=100)
    for counts in ({0: 70, 1: 5}, {0: 1, 1: 20, 2: 1}, {0: 1, 1: 1, 2: 1}, {2: 1}, {1: 40, 0: 7, 2: 64}):
        step = sequences.step(counts)
        native, torchs = (decoder.forward(step) for decoder in decoders)
        torch.testing.assert_close(native, torchs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_is_as_near_to_float32_as_torchs_is(name):
    config = config_of(**SHAPES[name])
    sequences = Sequences(16, count=2, longest=150)
    steps = [sequences.step(counts) for counts in ({0: 90, 1: 33}, {0: 1, 1: 1}, {0: 2, 1: 50})]

    def logits(kernels, dtype):
        decoder = make_decoder(kernels, config, RandomWeights(config), cache_of(config, dtype, 16), threads=1)
        return torch.cat([decoder.forward(step).clone() for step in steps])

    exact = logits(Kernels.TORCH, Dtype.FLOAT32)
    native, torchs = ((logits(kernels, Dtype.BFLOAT16) - exact).norm() for kernels in (Kernels.NATIVE, Kernels.TORCH))
    assert native <= 1.15 * torchs


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
@pytest.mark.parametrize("name", ["plain", "a window", "heads of 80, biases, norms of queries"])
def test_a_sequence_has_the_same_bits_in_any_batch_chunk_and_team(name, dtype):
    config = config_of(**SHAPES[name])

    def last_logits(threads, chunks):
        """Of sequence 0 after its 200 tokens, in these chunks, beside others that do as they like."""
        decoder = NativeDecoder(config, RandomWeights(config), cache_of(config, dtype, 16), threads)
        sequences = Sequences(16, count=6, longest=260)
        for number, count in enumerate(chunks):
            others = {1 + number % 5: 1 + 7 * number % 40} if number % 3 else {}
            logits = decoder.forward(sequences.step({**others, 0: count}))
        return logits[-1].clone()

    alone = last_logits(1, [200])
    assert not alone.isnan().any()
    for threads, chunks in ((1, [64, 136]), (2, [200]), (2, [16] * 12 + [7, 1]), (1, [150] + [1] * 50), (3, [199, 1])):
        assert torch.equal(last_logits(threads, chunks), alone), (threads, chunks)


def test_a_step_that_samples_nothing_has_no_logits():
    config = config_of()
    decoder = NativeDecoder(config, RandomWeights(config), cache_of(config, Dtype.FLOAT32, 4), 1)
    step = Sequences(4).step({0: 5})._replace(sampled=np.array([], dtype=np.int64))
    assert decoder.forward(step).shape == (0, VOCABULARY)


def test_the_loop_is_called_between_all_layers():
    config = config_of(layers=5, windows=(None,) * 5)
    decoder = NativeDecoder(config, RandomWeights(config), cache_of(config, Dtype.FLOAT32, 4), 1)
    calls = []
    decoder.forward(Sequences(4).step({0: 5}), lambda: calls.append(1))
    assert len(calls) == 5


@pytest.mark.parametrize("kernels", [Kernels.NATIVE, Kernels.TORCH])
def test_a_step_within_a_step_changes_neither(kernels):
    config = config_of(layers=3, windows=(None, 21, None))

    def logits(inner_after):
        """Of a prompt and, computed after so many of its layers (-1: after it), of a longer one."""
        decoder = make_decoder(kernels, config, RandomWeights(config), cache_of(config, Dtype.BFLOAT16, 16), threads=2)
        sequences = Sequences(16, count=2)
        outer, inner = sequences.step({0: 70}), sequences.step({1: 120})
        layers, found = [], []

        def between_layers():
            layers.append(1)
            if len(layers) == inner_after:
                found.append(decoder.forward(inner).clone())

        of_outer = decoder.forward(outer, between_layers).clone()
        return of_outer, *(found or [decoder.forward(inner).clone()])

    apart = logits(-1)
    for layer in (1, 3):
        for one, other in zip(logits(layer), apart, strict=True):
            assert torch.equal(one, other)


def test_packed_weights_keep_every_value_in_its_panel():
    weight = torch.arange(20 * 6, dtype=torch.float32).view(20, 6)
    panels = packed(weight.bfloat16())
    assert panels.shape == (2, 3, 16, 2)
    assert panels[1, 2, 3].tolist() == weight[19, 4:6].tolist()
    assert panels[1, :, 4:].count_nonzero() == 0
    pairs = packed_pairs(weight)
    assert pairs[0, 1, 5, 9, 0] == weight[19, 5]


UNSUPPORTED = {
    "head_dim": (config_of(head_dim=258), Dtype.FLOAT32),
    "odd": (config_of(hidden_size=63), Dtype.BFLOAT16),
    "float16": (config_of(), Dtype.FLOAT16),
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_the_kernels_cannot_do_torch_does_unless_they_were_asked_for(what):
    config, dtype = UNSUPPORTED[what]
    weights, cache = RandomWeights(config), cache_of(config, dtype, 4)
    assert isinstance(make_decoder(Kernels.AUTO, config, weights, cache, 1), TorchDecoder)
    with pytest.raises(NativeUnavailable, match="the native kernels"):
        make_decoder(Kernels.NATIVE, config, weights, cache, 1)


def test_without_a_compiler_torch_computes(monkeypatch):
    config = config_of()
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    cache = cache_of(config, Dtype.FLOAT32, 4)
    assert isinstance(make_decoder(Kernels.AUTO, config, RandomWeights(config), cache, 1), TorchDecoder)
    with pytest.raises(NativeUnavailable, match=r"install g\+\+"):
        library.load()


def test_an_older_processor_is_refused_by_the_name_of_what_it_lacks(monkeypatch):
    monkeypatch.setattr(library, "processor_features", lambda: frozenset({"avx512f", "sse4_2"}))
    with pytest.raises(NativeUnavailable, match="a processor with avx512bw, avx512dq, avx512vl"):
        library.load()


def test_kernels_that_an_image_brings_are_used_where_nothing_can_be_written(monkeypatch, tmp_path):
    def nowhere() -> Path:
        raise NativeUnavailable("a read-only file system")

    made = Path(library.load()._name)
    brought = tmp_path / library.CACHE / made.name
    brought.parent.mkdir(parents=True)
    shutil.copy(made, brought)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(library, "_cache", nowhere)
    assert library.load()._name == str(brought)


def test_the_compilers_complaint_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_cache", lambda: tmp_path)
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-DAHEAD=1"))
    with pytest.raises(NativeUnavailable, match=r"don't compile.*error"):
        library.load()
    assert not list(tmp_path.glob("*.so"))

"""Which dtype a device computes in when nobody says."""

from __future__ import annotations

import pytest
import torch

from cluster.config import Dtype
from engine import device


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"avx512f", "avx512_bf16"}, Dtype.BFLOAT16),
        ({"amx_bf16", "avx2"}, Dtype.BFLOAT16),
        ({"asimd", "bf16"}, Dtype.BFLOAT16),
        ({"avx512f", "avx2"}, Dtype.FLOAT32),
        (set(), Dtype.FLOAT32),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_it(monkeypatch, features, expected):
    monkeypatch.setattr(device, "processor_features", lambda: frozenset(features))
    assert device.resolve_dtype(Dtype.AUTO, torch.device("cpu")) is expected
    assert device.resolve_dtype(Dtype.FLOAT16, torch.device("cpu")) is Dtype.FLOAT16


@pytest.mark.parametrize("line", ["flags\t\t: fpu avx512f avx512_bf16", "Features\t: asimd bf16 avx512_bf16"])
def test_features_are_the_kernels_words(monkeypatch, line):
    text = f"processor\t: 0\n{line}\nbugs\t\t:\n"
    monkeypatch.setattr(device.Path, "read_text", lambda path: text)
    assert "avx512_bf16" in device.processor_features()


def test_without_the_kernels_word_there_are_none(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(device.Path, "read_text", missing)
    assert device.processor_features() == frozenset()

"""Which dtype a device computes in when nobody says."""

from __future__ import annotations

import pytest
import torch

from cluster.config import Device, Dtype
from cluster.errors import ConfigError
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


@pytest.fixture
def untouched(monkeypatch):
    """This process computes on as it did."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv(device.ONEDNN_CACHE, "1")


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("wanted", "gpus"), [(Device.AUTO, 2), (Device.CUDA, 2), (Device.AUTO, 4)])
def test_a_rank_opens_its_own_gpu_and_no_other(monkeypatch, wanted, gpus):
    opened = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", opened.append)
    assert device.open_device(wanted, rank=1, ranks=2, threads=1) == torch.device("cuda", 1)
    assert opened == [torch.device("cuda", 1)]


@pytest.mark.usefixtures("untouched")
def test_without_gpus_it_is_the_cpu_or_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device.open_device(Device.AUTO, rank=0, ranks=1, threads=1) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"model\.device: 1 ranks want a GPU each, and torch finds 0"):
        device.open_device(Device.CUDA, rank=0, ranks=1, threads=1)

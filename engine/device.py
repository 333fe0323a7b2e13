"""The device that an engine computes on, and what its process settles once, before the first kernel runs."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from cluster.config import Device, Dtype
from cluster.errors import ConfigError

ONEDNN_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
ONEDNN_CACHED = 256
"""Kernels that oneDNN keeps, a quarter of a megabyte each: more than steps use in turn, a quarter of its own choice."""

BFLOAT16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Of x86 processors, and of ARM's."""


def open_device(wanted: Device, rank: int, ranks: int, threads: int) -> torch.device:
    """The device of one of `ranks` processes, each of which has a GPU of its own; on CPU, operators use so many
    threads. What the user has set wins. Raises `ConfigError` if there are not enough GPUs."""
    torch.set_num_threads(threads)
    # oneDNN reads it when it makes its first kernel.
    os.environ.setdefault(ONEDNN_CACHE, str(ONEDNN_CACHED))
    available = torch.cuda.device_count()
    if wanted is Device.CPU or (wanted is Device.AUTO and not available):
        return torch.device("cpu")
    if ranks > available:
        raise ConfigError(f"model.device: {ranks} ranks want a GPU each, and torch finds {available}")
    device = torch.device("cuda", rank)
    # What names no device (pinned memory, NCCL, libraries) would otherwise open the first one, and take memory there.
    torch.cuda.set_device(device)
    return device


def resolve_dtype(wanted: Dtype, device: torch.device) -> Dtype:
    """`wanted`, or for `AUTO` the one that the device is fast in."""
    if wanted is not Dtype.AUTO:
        return wanted
    if device.type == "cuda":
        return Dtype.BFLOAT16 if torch.cuda.is_bf16_supported() else Dtype.FLOAT16
    return Dtype.BFLOAT16 if processor_features() & BFLOAT16_FEATURES else Dtype.FLOAT32


def processor_features() -> frozenset[str]:
    """What the kernel says of the first processor; nothing on a machine without /proc/cpuinfo."""
    try:
        described = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in described.splitlines() if line.startswith(("flags", "Features"))), "")
    return frozenset(line.partition(":")[2].split())

"""The device that an engine computes on, and what its process settles once, before the first kernel runs."""

from __future__ import annotations

import os

import torch

ONEDNN_CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
ONEDNN_CACHED = 256
"""Kernels that oneDNN keeps, a quarter of a megabyte each: more than steps use in turn, a quarter of its own choice."""


def open_device(name: str, threads: int) -> torch.device:
    """The device, in torch's naming; on CPU, operators use so many threads. What the user has set wins."""
    torch.set_num_threads(threads)
    # oneDNN reads it when it makes its first kernel.
    os.environ.setdefault(ONEDNN_CACHE, str(ONEDNN_CACHED))
    return torch.device(name)

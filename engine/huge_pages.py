"""Memory in huge pages, for what is large, lives long and is read again and again."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21
"""Bytes."""


def zeros_in_huge_pages(size: int, device: torch.device) -> Tensor:
    """uint8 [size], all of it touched, so that no request waits for the kernel to give memory; on Linux in huge pages.
    A transfer within a host is a copy by the kernel, which looks up each page of both sides first: with pages of 4 KiB
    it was seven times as slow (NIXL, 35 MB: 1.6 and 10.7 GB/s)."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).zero_()


class Arena:
    """Tensors side by side in huge pages, for as long as it lives."""

    ALIGNMENT = 64
    """Bytes of a cache line."""

    def __init__(self, size: int) -> None:
        """For `size` bytes, the tensors' alignment included (`padded`)."""
        self._memory = zeros_in_huge_pages(size + HUGE_PAGE, torch.device("cpu"))
        self._begin = self._next = -self._memory.data_ptr() % HUGE_PAGE

    @property
    def used(self) -> int:
        """Bytes of what was placed, its alignment included."""
        return self._next - self._begin

    @classmethod
    def padded(cls, size: int) -> int:
        """Bytes that a tensor of `size` bytes takes."""
        return -(-size // cls.ALIGNMENT) * cls.ALIGNMENT

    def place(self, tensor: Tensor) -> int:
        """Copies it, and returns the copy's address. Raises `ValueError` if there is no room."""
        size = tensor.nbytes
        target = self._memory[self._next : self._next + size]
        if len(target) < size:
            raise ValueError(f"no room for {size} bytes behind {self._next} of {len(self._memory)}")
        target.copy_(tensor.contiguous().view(-1).view(torch.uint8))
        self._next += self.padded(size)
        return target.data_ptr()

"""The KV pool: one contiguous allocation in the layout of `cluster.layout`, and views of it for attention.

A page is one range of bytes, so that a transfer engine can write it in one piece; that is why a layer's keys are
strided across the pool. Within a page all of a head is one range, so that workers whose heads are divided differently
still exchange whole ranges; and a head's tokens are neighbours: attention gathers head by head, in pieces of
page_size * head_dim, twice as fast on CPU as token by token. Which page belongs to whom is `engine.pages`' business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.layout import KVLayout
from engine.device_memory import GIB, free_memory
from engine.huge_pages import HUGE_PAGE, zeros_in_huge_pages
from engine.transit import to_device

ALIGNMENT = HUGE_PAGE
"""More than transfer engines ask for."""


class KVCache:
    """`pool` is [pages, kv_heads, layers, 2 (K then V), page_size, head_dim]; zeros at first. Owns its memory.

    Raises `ConfigError` if the machine has not that much left: the kernel would grant it, and kill us when it is used.
    """

    def __init__(self, layout: KVLayout, pages: int, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """`dtype`: of what attends over it; by default the layout's own."""
        self.layout = layout
        self.pages = pages
        self.page_bytes = layout.page_bytes
        stored: torch.dtype = getattr(torch, layout.dtype)
        self.dtype = dtype or stored
        _require_memory(layout, pages, device)
        memory = zeros_in_huge_pages(pages * layout.page_bytes + ALIGNMENT, device)
        begin = -memory.data_ptr() % ALIGNMENT
        shape = (pages, layout.kv_heads, layout.layers, 2, layout.page_size, layout.head_dim)
        self.pool = memory[begin : begin + pages * layout.page_bytes].view(stored).view(shape)

    @property
    def address(self) -> int:
        """Of the pool's first byte, a multiple of `ALIGNMENT`."""
        return self.pool.data_ptr()

    @property
    def device(self) -> str:
        """`cpu`, or `cuda:N`."""
        return str(self.pool.device)

    @property
    def nbytes(self) -> int:
        return self.pages * self.page_bytes

    def by_head(self, layer: int) -> Tensor:
        """One layer as [2, kv_heads, pages, page_size, head_dim], a strided view."""
        return self.pool[:, :, layer].permute(2, 1, 0, 3, 4)

    def by_token(self, layer: int) -> Tensor:
        """One layer as [2, pages, page_size, kv_heads, head_dim], a strided view."""
        return self.pool[:, :, layer].permute(2, 0, 3, 1, 4)

    def clear(self, pages: list[int]) -> None:
        """Zeroes these pages in all layers."""
        if pages:
            self.pool[to_device(torch.tensor(pages), self.pool.device)] = 0


def _require_memory(layout: KVLayout, pages: int, device: torch.device) -> None:
    available = free_memory(device)
    wanted = pages * layout.page_bytes
    if wanted > available:
        raise ConfigError(
            f"kv.pool_tokens: a pool of {pages * layout.page_size} tokens takes {wanted / GIB:.1f} GiB, but {device} "
            f"has {available / GIB:.1f} GiB left: at most {available // layout.token_bytes} tokens fit; lower it, or "
            "kv.memory_fraction"
        )

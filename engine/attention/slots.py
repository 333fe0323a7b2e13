"""Where in the pool a step's keys and values go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention.base import Span
from engine.transit import to_device

Integers = npt.NDArray[np.int64]


class Slots(NamedTuple):
    """Of each row of the step, padding left out."""

    pages: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, spans: Sequence[Span], page_size: int, device: torch.device) -> Slots:
        positions = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        pages = np.concatenate([_repeat_pages(span, page_size) for span in spans])
        return cls(*to_device(torch.from_numpy(np.stack((pages, positions % page_size))), device))

    def write(self, keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> None:
        """`key` and `value` [rows, kv_heads, head_dim] into a layer's [pages, page_size, kv_heads, head_dim]."""
        keys.index_put_(self, _as_stored(key[: len(self.pages)], keys.dtype))
        values.index_put_(self, _as_stored(value[: len(self.pages)], values.dtype))


def _as_stored(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What is too large for eight bits becomes the largest that they have, not infinite."""
    if dtype == rows.dtype:
        return rows
    limits = torch.finfo(dtype)
    return rows.clamp(limits.min, limits.max).to(dtype)


def _repeat_pages(span: Span, page_size: int) -> Integers:
    """The page of each position of the span."""
    first, last = span.start // page_size, -(-span.stop // page_size)
    pages: Integers = np.repeat(np.array(span.pages[first:last], dtype=np.int64), page_size)
    return pages[span.start - first * page_size : span.stop - first * page_size]

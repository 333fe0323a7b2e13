"""Steps of attention over a paged cache, compared with the formula, sequence by sequence and query by query."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch

from cluster.layout import KVLayout
from engine.attention.base import Span
from engine.kv_cache import KVCache

HEADS, KV_HEADS, LAYERS = 6, 2, 3


class Place(NamedTuple):
    """Where it is computed, in what, and how far from the formula the result may be."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    distance: float


CPU = Place(torch.device("cpu"), torch.float32, 16, 2e-5)


def formula(query, keys, values, window):
    """Softmax attention of the last len(query) positions over all keys. [tokens, heads, head_dim] each."""
    output = torch.empty_like(query)
    for index in range(len(query)):
        position = len(keys) - len(query) + index
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(query.shape[1]):
            shared = head // (query.shape[1] // keys.shape[1])
            scores = keys[first : position + 1, shared] @ query[index, head] / math.sqrt(query.shape[2])
            output[index, head] = scores.softmax(0) @ values[first : position + 1, shared]
    return output


class Bench:
    """A cache full of NaN, and what each sequence has put into it."""

    def __init__(self, make, page_size, pages=200, windows=(None,) * LAYERS, seed=0, stored="float32", place=CPU):
        self.place = place
        self.layout = KVLayout("m", stored, page_size, LAYERS, KV_HEADS, place.head_dim)
        self.cache = KVCache(self.layout, pages, place.device, place.dtype)
        self.windows = windows
        self.cache.pool.fill_(math.nan)
        self.backend = make(self.cache, HEADS, windows)
        self.generator = torch.Generator().manual_seed(seed)
        self.free = list(range(pages))
        random.Random(seed).shuffle(self.free)
        self.pages: dict[str, list[int]] = {}
        self.past: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def step(self, **counts):
        """Computes `counts[name]` further tokens of each sequence and compares all layers."""
        spans, row = [], 0
        for name, count in counts.items():
            past = self.past.setdefault(name, [(torch.empty(0, KV_HEADS, self.place.head_dim),) * 2] * LAYERS)
            start = len(past[0][0])
            pages = self.pages.setdefault(name, [])
            # One more than needed: what a sequence owns and has not begun must not matter.
            while len(pages) < self.layout.pages_for(start + count) + 1:
                pages.append(self.free.pop())
            spans.append(Span(row, start, start + count, pages))
            row += count
        padding = row % 3
        step = self.backend.plan(spans, row + padding)
        for layer in range(LAYERS):
            query, key, value = (
                torch.randn(row + padding, heads, self.place.head_dim, generator=self.generator).to(self.place.dtype)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            on_device = (each.to(self.place.device) for each in (query, key, value))
            found = step.attend(layer, *on_device)
            assert found.is_contiguous()
            query, found = query.float(), found.cpu().float()
            for span, name in zip(spans, counts, strict=True):
                rows = slice(span.row, span.row + span.stop - span.start)
                keys, values = self.past[name][layer]
                key_kept, value_kept = (kept[rows].to(self.cache.pool.dtype).float() for kept in (key, value))
                keys, values = torch.cat((keys, key_kept)), torch.cat((values, value_kept))
                past = self.past[name] = list(self.past[name])
                past[layer] = (keys, values)
                expected = formula(query[rows], keys, values, self.windows[layer])
                torch.testing.assert_close(found[rows], expected, atol=self.place.distance, rtol=1e-4)

"""Paged attention in plain torch: the CPU backend, and the reference for the others.

Sequences attend in groups (`engine.attention.grouping`). Per group and layer: gather its pages head by head, then for
each block of queries multiply, mask, softmax (summed in float32), multiply. Queries that share a key/value head are
folded into one product, causal blocks stop at their last key. torch's own CPU kernel for scaled dot products is two to
three times slower here in bfloat16, for decode's few queries and for prefill's many.

Masked keys weigh nothing, but a stale NaN times nothing is NaN. So padding repeats a sequence's own pages, and a page
that a step begins and leaves partly empty is zeroed first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention.base import Span
from engine.attention.grouping import Extent, group_by_extent
from engine.attention.slots import Slots
from engine.kv_cache import KVCache
from engine.shapes import rounded, series
from engine.transit import to_device

BLOCK_QUERIES = 64
"""Queries of one product: its scores stay in the cache, and a causal prefill skips most of what it may not see."""
SMALL_BLOCK_QUERIES = 16
"""For short prompts, and where a whole block had too many scores."""
BLOCK_SCORES = 1 << 23
STEP_PAGES = 2
"""Least step of `engine.shapes` for a group's pages."""

Integers = npt.NDArray[np.int64]


class _Block(NamedTuple):
    """Queries [begin, end) of each member of a group, which see at most the first `keys` keys."""

    begin: int
    end: int
    keys: int
    masked_from: int
    mask: Tensor
    """[members, 1, end - begin, keys - masked_from], 0 or -inf. All keys below `masked_from` are seen."""


class _Group(NamedTuple):
    """Sequences that attend as one batch, padded to the same number of queries and pages."""

    members: int
    queries: int
    rows: Tensor | None
    """The step's row of each query, [members * queries]; None where they are the first rows in order."""
    pages: Tensor
    """[members * pages per member]"""
    blocks: list[_Block]


class _WindowPlan(NamedTuple):
    groups: list[_Group]
    order: Tensor | None
    """Where in the groups' concatenated queries each row of the step is; None where it is in order."""


class TorchPagedAttention:
    """Implements `AttentionBackend`. `windows[layer]` is that layer's sliding window, or None."""

    def __init__(self, cache: KVCache, heads: int, windows: Sequence[int | None]) -> None:
        self._cache = cache
        self._heads = heads
        self._windows = tuple(windows)
        self._by_head = [cache.by_head(layer) for layer in range(cache.layout.layers)]
        self._by_token = [(keys, values) for keys, values in map(cache.by_token, range(cache.layout.layers))]
        self._workspace = cache.pool.new_empty(0)

    def warm_up(self, page: int, context: int) -> None:
        layout = self._cache.layout
        layers = {window: layer for layer, window in enumerate(self._windows)}.values()
        for pages in series(layout.pages_for(context), STEP_PAGES):
            stop = pages * layout.page_size
            for queries in (1, SMALL_BLOCK_QUERIES, BLOCK_QUERIES):
                start = max(0, stop - queries)
                step = self.plan([Span(0, start, stop, [page] * pages)], stop - start)
                query = self._workspace.new_zeros(stop - start, self._heads, layout.head_dim, dtype=self._cache.dtype)
                key = query[:, : layout.kv_heads]
                for layer in layers:
                    step.attend(layer, query, key, key)

    def fixed(self, sequences: int, context: int) -> None:
        """Its groups have the sizes of the sequences in them: no two steps are alike."""

    def plan(self, spans: Sequence[Span], rows: int) -> TorchStepAttention:
        page_size = self._cache.layout.page_size
        begun = [
            span.pages[span.stop // page_size]
            for span in spans
            if span.stop % page_size and span.stop // page_size * page_size >= span.start
        ]
        self._cache.clear(begun)
        plans = {window: self._plan_window(spans, rows, window) for window in set(self._windows)}
        slots = Slots.of(spans, page_size, self._cache.pool.device)
        return TorchStepAttention(self, slots, [plans[window] for window in self._windows])

    def _plan_window(self, spans: Sequence[Span], rows: int, window: int | None) -> _WindowPlan:
        page_size = self._cache.layout.page_size
        # The first page that any query of the span can see.
        firsts = [0 if window is None else max(0, span.start - window + 1) // page_size for span in spans]
        lasts = [-(-span.stop // page_size) for span in spans]
        extents = [
            Extent(_padded_queries(span.stop - span.start), rounded(last - first, STEP_PAGES) * page_size)
            for span, first, last in zip(spans, firsts, lasts, strict=True)
        ]
        memberships = group_by_extent(extents)
        groups, members_rows = [], []
        for members in memberships:
            queries = max(extents[member].queries for member in members)
            pages = max(extents[member].keys for member in members) // page_size
            member_spans = [spans[member] for member in members]
            member_firsts = [firsts[member] for member in members]
            query_rows = _padded_rows(member_spans, queries)
            members_rows.append(query_rows)
            in_order = len(memberships) == 1 and bool((query_rows == np.arange(len(query_rows))).all())
            groups.append(
                _Group(
                    len(members),
                    queries,
                    None if in_order else self._to_device(query_rows),
                    self._to_device(_padded_pages(member_spans, member_firsts, pages, page_size)),
                    list(self._blocks(member_spans, member_firsts, queries, window)),
                )
            )
        if groups[0].rows is None and len(members_rows[0]) == rows:
            return _WindowPlan(groups, None)
        order = np.zeros(rows, dtype=np.int64)
        concatenated = np.concatenate(members_rows)
        # A padded query repeats its sequence's last row: whichever of the equal results is kept is right.
        order[concatenated] = np.arange(len(concatenated))
        return _WindowPlan(groups, self._to_device(order))

    def _blocks(self, spans: list[Span], firsts: list[int], queries: int, window: int | None) -> list[_Block]:
        page_size, device = self._cache.layout.page_size, self._cache.pool.device
        # In positions relative to the first gathered key of each member.
        starts = np.array([span.start - first * page_size for span, first in zip(spans, firsts, strict=True)])
        counts = np.array([span.stop - span.start for span in spans])
        longest = int((starts + counts).max())
        small = BLOCK_QUERIES * self._heads * len(spans) * longest > BLOCK_SCORES
        size = min(queries, SMALL_BLOCK_QUERIES if small else BLOCK_QUERIES)
        blocks = []
        for begin in range(0, queries, size):
            end = begin + size
            seen = starts[:, None] + np.minimum(np.arange(begin, end), counts[:, None] - 1)
            keys = rounded(int(seen.max()) // page_size + 1, STEP_PAGES) * page_size
            masked_from = 0 if window is not None else int(seen.min()) + 1
            key = np.arange(masked_from, keys)
            hidden = key > seen[..., None]
            if window is not None:
                hidden |= key <= seen[..., None] - window
            mask = np.where(hidden, np.float32(-np.inf), np.float32(0.0))[:, None]
            blocks.append(
                _Block(begin, end, keys, masked_from, to_device(torch.from_numpy(mask), device).to(self._cache.dtype))
            )
        return blocks

    def write(self, layer: int, slots: Slots, key: Tensor, value: Tensor) -> None:
        slots.write(*self._by_token[layer], key, value)

    def gather(self, layer: int, group: _Group) -> Tensor:
        """Keys and values of a group, [2, kv_heads, members, keys, head_dim]; valid until the next call."""
        layout = self._cache.layout
        shape = (2, layout.kv_heads, len(group.pages), layout.page_size, layout.head_dim)
        size = 2 * layout.kv_heads * len(group.pages) * layout.page_size * layout.head_dim
        if self._workspace.numel() < size:
            self._workspace = self._workspace.new_empty(size)
        gathered = self._workspace[:size].view(shape)
        torch.index_select(self._by_head[layer], 2, group.pages, out=gathered)
        return gathered.to(self._cache.dtype).view(2, layout.kv_heads, group.members, -1, layout.head_dim)

    def _to_device(self, array: Integers) -> Tensor:
        return to_device(torch.from_numpy(array), self._cache.pool.device)


class TorchStepAttention:
    """Implements `StepAttention`."""

    def __init__(self, backend: TorchPagedAttention, slots: Slots, plans: list[_WindowPlan]) -> None:
        self._backend = backend
        self._slots = slots
        self._plans = plans

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._backend.write(layer, self._slots, key, value)
        plan = self._plans[layer]
        outputs = [self._attend_group(layer, group, query) for group in plan.groups]
        if plan.order is None:
            return outputs[0]
        return torch.cat(outputs).index_select(0, plan.order)

    def _attend_group(self, layer: int, group: _Group, query: Tensor) -> Tensor:
        keys, values = self._backend.gather(layer, group)
        kv_heads, head_dim = keys.shape[0], keys.shape[-1]
        count = group.members * group.queries
        rows = (query[:count] if group.rows is None else query.index_select(0, group.rows)) * head_dim**-0.5
        # [kv_heads, members, query heads of one key/value head, queries, head_dim]
        folded = rows.view(group.members, group.queries, kv_heads, -1, head_dim).permute(2, 0, 3, 1, 4)
        blocks = [_attend_block(block, folded, keys, values) for block in group.blocks]
        output = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 3)
        return output.permute(1, 3, 0, 2, 4).contiguous().view(count, -1, head_dim)


def _attend_block(block: _Block, folded: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[kv_heads, members, query heads of one key/value head, end - begin, head_dim]"""
    query = folded[:, :, :, block.begin : block.end]
    kv_heads, members, shared, queries, head_dim = query.shape
    stacked = query.reshape(kv_heads, members, shared * queries, head_dim)
    scores = torch.matmul(stacked, keys[:, :, : block.keys].transpose(-1, -2))
    scores.view(kv_heads, members, shared, queries, block.keys)[..., block.masked_from :].add_(block.mask)
    weights = torch.softmax(scores, -1)
    return torch.matmul(weights, values[:, :, : block.keys]).view(kv_heads, members, shared, queries, head_dim)


def _padded_queries(queries: int) -> int:
    """One, as decodes have, or whole blocks."""
    sizes = (1, SMALL_BLOCK_QUERIES)
    return next((size for size in sizes if queries <= size), -(-queries // BLOCK_QUERIES) * BLOCK_QUERIES)


def _padded_rows(spans: list[Span], queries: int) -> Integers:
    """Each member's rows, its last one repeated up to `queries`."""
    first = np.array([span.row for span in spans])[:, None]
    last = np.array([span.stop - span.start - 1 for span in spans])[:, None]
    rows: Integers = first + np.minimum(np.arange(queries), last)
    return rows.reshape(-1)


def _padded_pages(spans: list[Span], firsts: list[int], pages: int, page_size: int) -> Integers:
    """Each member's pages from its first one to its last query's, then the first one again, up to `pages`."""
    padded = np.empty((len(spans), pages), dtype=np.int64)
    for row, span, first in zip(padded, spans, firsts, strict=True):
        held = span.pages[first : -(-span.stop // page_size)]
        row[: len(held)] = held
        row[len(held) :] = held[0]
    return padded.reshape(-1)

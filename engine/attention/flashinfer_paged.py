"""Paged attention by flashinfer's kernels, for NVIDIA GPUs. Ye et al., FlashInfer (arXiv:2501.01005).

Sequences with one token go through its decode kernels, those with more through its prefill kernels, whose causal mask
is aligned at the sequences' ends: that of a chunk that is appended. Both are planned once per step and sliding window,
on the host, and run once per layer over the pool as it is: to them a layer's keys and values are [pages, kv_heads,
page_size, head_dim] with strides ("HND"). Its kernels read no slot behind a sequence's last token.

A plan leaves for the device out of pinned memory of the wrapper's own, so a wrapper is not planned again before that
copy has been made; a step that is launched while the one before it is computed waits for its beginning, not its end.
For decode steps in CUDA graphs there are wrappers with a fixed number of sequences, whose plans go where the captured
kernels look for them.

The library is compiled for a model's sizes when it is first used, which `warm_up` sees to. What it is given has been
computed with on a CPU, in the tests; on a GPU it has not run so far.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import accumulate, chain
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ConfigError
from engine.attention.base import Span
from engine.attention.slots import Slots
from engine.kv_cache import KVCache
from engine.transit import Mark, staged, to_device

MODULE = "flashinfer"
LAYOUT = "HND"
WORKSPACE_BYTES = 128 << 20
"""As flashinfer recommends; partial results of long sequences that several blocks of threads share."""
TENSOR_CORE_GROUP = 4
"""Query heads per key/value head from which on decode is faster as a product on tensor cores."""
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
UNLIMITED = -1


class FlashInferUnavailable(ConfigError):
    """flashinfer is not installed, or can't run this model on this device."""


class Wrapper(Protocol):
    """What we use of `BatchDecodeWithPagedKVCacheWrapper` and `BatchPrefillWithPagedKVCacheWrapper`."""

    def plan(self, *arrays: Tensor | int, **settings: Any) -> None:
        """Arrays are on the host, but for pages; the library copies what its kernels need."""

    def run(self, query: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        """Writes to `out`, of `query`'s shape, and returns it."""


class Library(Protocol):
    """What we use of the module `flashinfer`."""

    def BatchDecodeWithPagedKVCacheWrapper(self, workspace: Tensor, layout: str, **settings: Any) -> Wrapper: ...  # noqa: N802

    def BatchPrefillWithPagedKVCacheWrapper(self, workspace: Tensor, layout: str, **settings: Any) -> Wrapper: ...  # noqa: N802


class PageTable(NamedTuple):
    """The pages of some sequences, one after the other; all int32."""

    begins: Tensor
    """[sequences + 1]: where each one's pages begin in `pages`, and the end of the last."""
    pages: Tensor
    last_lengths: Tensor
    """[sequences]: tokens in each one's last page, at least 1."""

    @classmethod
    def of(cls, spans: Sequence[Span], page_size: int, device: torch.device) -> PageTable:
        """Up to the end of each span. The pages on the device: the host's the library would copy, and wait."""
        held = [span.pages[: -(-span.stop // page_size)] for span in spans]
        lengths = [(span.stop - 1) % page_size + 1 for span in spans]
        return cls(
            staged(_begins([len(pages) for pages in held]), device),
            to_device(_int32(list(chain(*held))), device),
            staged(_int32(lengths), device),
        )


class Wrappers(NamedTuple):
    """By sliding window. They keep what was planned, so a step has them to itself until its last layer."""

    decodes: dict[int | None, Wrapper]
    prefills: dict[int | None, Wrapper]
    copied: Mark
    """Behind the copies of the last plans."""


class _Part(NamedTuple):
    """Sequences of a step that are computed together."""

    rows: Tensor | slice
    """Of the step: their queries."""
    wrappers: dict[int | None, Wrapper]
    """Planned."""


class FlashInferAttention:
    """Implements `AttentionBackend`. `windows[layer]` is that layer's sliding window, or None."""

    def __init__(
        self,
        cache: KVCache,
        heads: int,
        windows: Sequence[int | None],
        library: Library,
        workspace_bytes: int = WORKSPACE_BYTES,
    ) -> None:
        self._cache = cache
        self._heads = heads
        self._windows = tuple(windows)
        self._library = library
        layers = range(cache.layout.layers)
        self._by_token = [(keys, values) for keys, values in map(cache.by_token, layers)]
        self._by_head = [(keys.transpose(0, 1), values.transpose(0, 1)) for keys, values in map(cache.by_head, layers)]
        # All wrappers have the same work space: kernels run one after the other.
        self._workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=cache.pool.device)
        self._idle: list[Wrappers] = []
        """Of no step."""
        self._fixed_pages = _int32([]).to(cache.pool.device)
        """Where those with a fixed number of sequences have their pages, in turn."""

    def warm_up(self, page: int, context: int) -> None:
        layout = self._cache.layout
        layers = {window: layer for layer, window in enumerate(self._windows)}.values()
        for tokens in (1, min(context, layout.page_size + 1)):
            step = self.plan([Span(0, 0, tokens, [page] * layout.pages_for(tokens))], tokens)
            query = self._cache.pool.new_zeros(tokens, self._heads, layout.head_dim, dtype=self._cache.dtype)
            key = query[:, : layout.kv_heads]
            for layer in sorted(layers):
                step.attend(layer, query, key, key)

    def plan(self, spans: Sequence[Span], rows: int) -> FlashInferStep:
        wrappers = self._idle.pop() if self._idle else self._new_wrappers()
        decodes = [span for span in spans if span.stop - span.start == 1]
        prefills = [span for span in spans if span.stop - span.start > 1]
        parts = []
        wrappers.copied.wait()
        if decodes:
            self._plan(wrappers.decodes, [], decodes)
            parts.append(_Part(self._rows(decodes), wrappers.decodes))
        if prefills:
            queries = _begins([span.stop - span.start for span in prefills])
            self._plan(wrappers.prefills, [staged(queries, self._cache.pool.device)], prefills, causal=True)
            parts.append(_Part(self._rows(prefills), wrappers.prefills))
        wrappers.copied.set()
        slots = Slots.of(spans, self._cache.layout.page_size, self._cache.pool.device)
        return FlashInferStep(self, wrappers, slots, parts)

    def fixed(self, sequences: int, context: int) -> FlashInferFixed:
        device, pages = self._cache.pool.device, sequences * self._cache.layout.pages_for(context)
        if len(self._fixed_pages) < pages:
            self._fixed_pages = torch.zeros(pages, dtype=torch.int32, device=device)
        wrappers = {window: self._fixed_wrapper(sequences) for window in set(self._windows)}
        slots = torch.zeros(2, sequences, dtype=torch.int64, device=device)
        return FlashInferFixed(self, Wrappers(wrappers, {}, Mark(device)), slots)

    def place(self, spans: Sequence[Span], wrappers: Wrappers, slots: Tensor) -> None:
        """See `FixedAttention.place`; `slots` [2, len(spans)] are written to."""
        wrappers.copied.wait()
        self._plan(wrappers.decodes, [], spans)
        wrappers.copied.set()
        for kept, placed in zip(slots, Slots.of(spans, self._cache.layout.page_size, slots.device), strict=True):
            kept.copy_(placed)

    def attend(self, layer: int, slots: Slots, parts: list[_Part], rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """See `StepAttention.attend`; `rows`: its query, key and value."""
        query, key, value = rows
        slots.write(*self._by_token[layer], key, value)
        attended = torch.empty_like(query, memory_format=torch.contiguous_format)
        for part in parts:
            queries = query[part.rows].contiguous()
            run = part.wrappers[self._windows[layer]].run
            if isinstance(part.rows, slice):
                run(queries, self._by_head[layer], out=attended[part.rows])
            else:
                attended.index_copy_(0, part.rows, run(queries, self._by_head[layer], out=torch.empty_like(queries)))
        return attended

    def give_back(self, layer: int, wrappers: Wrappers) -> None:
        """`layer` has been attended; after the last one another step may have the wrappers."""
        if layer == self._cache.layout.layers - 1:
            self._idle.append(wrappers)

    def _new_wrappers(self) -> Wrappers:
        library, windows = self._library, set(self._windows)
        return Wrappers(
            {window: self._decode_wrapper() for window in windows},
            {window: library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, LAYOUT) for window in windows},
            Mark(self._cache.pool.device),
        )

    def _decode_wrapper(self, **settings: Any) -> Wrapper:
        tensor_cores = self._heads // self._cache.layout.kv_heads >= TENSOR_CORE_GROUP
        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, LAYOUT, use_tensor_cores=tensor_cores, **settings
        )

    def _fixed_wrapper(self, sequences: int) -> Wrapper:
        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self._cache.pool.device)

        return self._decode_wrapper(
            use_cuda_graph=True,
            paged_kv_indptr_buffer=zeros(sequences + 1),
            paged_kv_indices_buffer=self._fixed_pages,
            paged_kv_last_page_len_buffer=zeros(sequences),
        )

    def _plan(
        self, wrappers: dict[int | None, Wrapper], queries: list[Tensor], spans: Sequence[Span], **settings: Any
    ) -> None:
        layout = self._cache.layout
        table = PageTable.of(spans, layout.page_size, self._cache.pool.device)
        for window, wrapper in wrappers.items():
            wrapper.plan(
                *queries,
                *table,
                self._heads,
                layout.kv_heads,
                layout.head_dim,
                layout.page_size,
                # Theirs counts the tokens before a query, ours the query too.
                window_left=UNLIMITED if window is None else window - 1,
                q_data_type=self._cache.dtype,
                kv_data_type=self._cache.pool.dtype,
                **settings,
            )

    def _rows(self, spans: Sequence[Span]) -> Tensor | slice:
        rows = np.concatenate([np.arange(span.row, span.row + span.stop - span.start) for span in spans])
        if rows[-1] - rows[0] == len(rows) - 1:
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return to_device(torch.from_numpy(rows), self._cache.pool.device)


class FlashInferFixed:
    """Implements `FixedAttention`. Row i is the i-th span's."""

    def __init__(self, backend: FlashInferAttention, wrappers: Wrappers, slots: Tensor) -> None:
        """`slots` [2, sequences], see `Slots`."""
        self._backend = backend
        self._wrappers = wrappers
        self._slots = slots
        self._parts = [_Part(slice(0, slots.shape[1]), wrappers.decodes)]

    def place(self, spans: Sequence[Span]) -> None:
        self._backend.place(spans, self._wrappers, self._slots)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._backend.attend(layer, Slots(*self._slots), self._parts, (query, key, value))


class FlashInferStep:
    """Implements `StepAttention`."""

    def __init__(self, backend: FlashInferAttention, wrappers: Wrappers, slots: Slots, parts: list[_Part]) -> None:
        self._backend = backend
        self._wrappers = wrappers
        self._slots = slots
        self._parts = parts

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended = self._backend.attend(layer, self._slots, self._parts, (query, key, value))
        self._backend.give_back(layer, self._wrappers)
        return attended


def open_flashinfer(cache: KVCache) -> ModuleType:
    """The library, if it computes with such a cache. Raises `FlashInferUnavailable` that says why not."""
    device, head_dim = cache.pool.device, cache.layout.head_dim
    if device.type != "cuda":
        raise FlashInferUnavailable(f"flashinfer computes on CUDA, not on {device}")
    if cache.dtype not in DTYPES or head_dim not in HEAD_DIMS:
        raise FlashInferUnavailable(
            f"flashinfer computes bfloat16 and float16 with heads of 64, 128 or 256, not {cache.dtype} of {head_dim}"
        )
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        raise FlashInferUnavailable(f"flashinfer can't be imported ({error}): pip install flashinfer-python") from error


def _begins(counts: Sequence[int]) -> Tensor:
    """Where each one of neighbours with so many members begins, and the end of the last."""
    return _int32([0, *accumulate(counts)])


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)

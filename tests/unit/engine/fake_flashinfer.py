"""flashinfer's two wrappers, computed in torch from what they are planned with; and a record of how they are called."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch


class Call(NamedTuple):
    """Of a method of one of the wrappers."""

    wrapper: str
    method: str
    arguments: tuple[Any, ...]
    settings: dict[str, Any]


class FakeFlashInfer:
    """Stands for the module."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.made = 0

    def BatchDecodeWithPagedKVCacheWrapper(self, workspace, layout, **settings):  # noqa: N802
        return FakeWrapper(self, "BatchDecodeWithPagedKVCacheWrapper", (workspace, layout), settings)

    def BatchPrefillWithPagedKVCacheWrapper(self, workspace, layout, **settings):  # noqa: N802
        return FakeWrapper(self, "BatchPrefillWithPagedKVCacheWrapper", (workspace, layout), settings)


class FakeWrapper:
    def __init__(self, library, name, arguments, settings) -> None:
        self._library = library
        self._name = name
        library.made += 1
        self._record("__init__", arguments, settings)

    def plan(self, *arguments, **settings):
        self._record("plan", arguments, settings)
        arrays, sizes = arguments[:-4], arguments[-4:]
        assert all(array.dtype == torch.int32 and array.device.type == "cpu" for array in arrays)
        *queries, begins, pages, last_lengths = (array.tolist() for array in arrays)
        assert len(queries) == (1 if "Prefill" in self._name else 0)
        # Decode: one query each.
        self._queries = queries[0] if queries else list(range(len(begins)))
        self._pages = [pages[begin:end] for begin, end in pairwise(begins)]
        self._last_lengths = last_lengths
        self._sizes = sizes
        self._causal = settings.get("causal", not queries)
        self._window = settings["window_left"]
        self._dtypes = settings["q_data_type"], settings["kv_data_type"]
        assert begins[-1] == len(pages)

    def run(self, query, paged_kv_cache, *, out):
        self._record("run", (query, paged_kv_cache), {"out": out})
        heads, kv_heads, head_dim, page_size = self._sizes
        keys, values = paged_kv_cache
        assert query.is_contiguous()
        assert query.shape == out.shape == (self._queries[-1], heads, head_dim)
        assert keys.shape[1:] == values.shape[1:] == (kv_heads, page_size, head_dim)
        assert (query.dtype, keys.dtype) == self._dtypes
        for sequence, (pages, last) in enumerate(zip(self._pages, self._last_lengths, strict=True)):
            rows = slice(self._queries[sequence], self._queries[sequence + 1])
            assert 1 <= last <= page_size
            length = (len(pages) - 1) * page_size + last
            # [kv_heads, tokens, head_dim]: nothing behind the last token is looked at.
            seen, read = (
                part[pages].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :length].float()
                for part in (keys, values)
            )
            seen, read = (part.repeat_interleave(heads // kv_heads, 0) for part in (seen, read))
            scores = query[rows].float().transpose(0, 1) @ seen.transpose(1, 2) / math.sqrt(head_dim)
            scores.masked_fill_(self._hidden(rows.stop - rows.start, length), -math.inf)
            out[rows] = (scores.softmax(-1) @ read).transpose(0, 1).to(out.dtype)
        return out

    def _hidden(self, queries, keys):
        """[queries, keys]; the last query is at the last key."""
        position = torch.arange(keys - queries, keys)[:, None]
        key = torch.arange(keys)
        hidden = (key > position) if self._causal else torch.zeros(queries, keys, dtype=torch.bool)
        return hidden | (key < position - self._window) if self._window >= 0 else hidden

    def _record(self, method, arguments, settings):
        self._library.calls.append(Call(self._name, method, arguments, settings))

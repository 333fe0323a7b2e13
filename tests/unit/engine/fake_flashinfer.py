"""What we use of flashinfer, computed in torch by the definition of each; and a record of how it is called.

A wrapper for CUDA graphs computes from nothing but the buffers that it was made with, as a captured kernel does.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch


class Call(NamedTuple):
    """Of a method of one of the wrappers, or of the module."""

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

    def rmsnorm(self, input, weight, eps):
        self.record("", "rmsnorm", (input, weight, eps), {})
        assert input.is_contiguous()
        wide = input.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(input.dtype)

    def fused_add_rmsnorm(self, input, residual, weight, eps):
        self.record("", "fused_add_rmsnorm", (input, residual, weight, eps), {})
        residual.copy_(residual.float() + input.float())
        input.copy_(self.rmsnorm(residual, weight, eps))

    def apply_rope_with_cos_sin_cache_inplace(self, positions, query, key, head_size, cos_sin_cache, is_neox):
        arguments = positions, query, key, head_size, cos_sin_cache, is_neox
        self.record("", "apply_rope_with_cos_sin_cache_inplace", arguments, {})
        assert cos_sin_cache.dtype == torch.float32 and cos_sin_cache.is_contiguous() and positions.is_contiguous()
        cosine, sine = cos_sin_cache[positions][:, None].chunk(2, -1)
        for heads in (query, key):
            halves = heads.view(len(heads), -1, head_size)
            first, second = (half.float() for half in halves.chunk(2, -1))
            halves.copy_(torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1))

    def silu_and_mul(self, input):
        self.record("", "silu_and_mul", (input,), {})
        gate, up = input.float().chunk(2, -1)
        return (gate * gate.sigmoid() * up).to(input.dtype)

    def top_p_renorm_probs(self, probs, top_p, is_deterministic=False):
        self.record("", "top_p_renorm_probs", (probs, top_p), {"is_deterministic": is_deterministic})
        assert is_deterministic and top_p.dtype == probs.dtype == torch.float32 and top_p.shape == (len(probs),)
        best, order = probs.sort(-1, descending=True)
        inside = best.double().cumsum(-1) - best < top_p[:, None]
        kept = torch.zeros_like(probs).scatter_(-1, order, torch.where(inside, best, 0.0))
        return kept / kept.sum(-1, keepdim=True)

    def record(self, wrapper, method, arguments, settings):
        self.calls.append(Call(wrapper, method, arguments, settings))


class FakeWrapper:
    def __init__(self, library, name, arguments, settings) -> None:
        self._library = library
        self._name = name
        self._graphed = settings.get("use_cuda_graph", False)
        if self._graphed:
            self._buffers = [settings[f"paged_kv_{name}_buffer"] for name in ("indptr", "indices", "last_page_len")]
        library.made += 1
        self._record("__init__", arguments, settings)

    def plan(self, *arguments, **settings):
        self._record("plan", arguments, settings)
        arrays, sizes = arguments[:-4], arguments[-4:]
        assert all(array.dtype == torch.int32 and array.device.type == "cpu" for array in arrays)
        *queries, begins, pages, last_lengths = arrays
        assert len(queries) == (1 if "Prefill" in self._name else 0)
        assert begins[-1] == len(pages)
        # Decode: one query each.
        self._queries = queries[0].tolist() if queries else list(range(len(begins)))
        if self._graphed:
            for buffer, array in zip(self._buffers, (begins, pages, last_lengths), strict=True):
                assert len(array) == len(buffer) or buffer is self._buffers[1]
                buffer[: len(array)] = array
        else:
            self._buffers = [begins, pages, last_lengths]
        self._sizes = sizes
        self._causal = settings.get("causal", not queries)
        self._window = settings["window_left"]
        self._dtypes = settings["q_data_type"], settings["kv_data_type"]

    def run(self, query, paged_kv_cache, *, out):
        self._record("run", (query, paged_kv_cache), {"out": out})
        heads, kv_heads, head_dim, page_size = self._sizes
        keys, values = paged_kv_cache
        assert query.is_contiguous()
        assert query.shape == out.shape == (self._queries[-1], heads, head_dim)
        assert keys.shape[1:] == values.shape[1:] == (kv_heads, page_size, head_dim)
        assert (query.dtype, keys.dtype) == self._dtypes
        begins, pages_of_all, last_lengths = (buffer.tolist() for buffer in self._buffers)
        for sequence, ((begin, end), last) in enumerate(zip(pairwise(begins), last_lengths, strict=True)):
            pages = pages_of_all[begin:end]
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
        self._library.record(self._name, method, arguments, settings)

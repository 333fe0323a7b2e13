"""The decoder in C++ kernels: one call per layer, buffers that are kept, no padding.

As one rank of several it has a part of the weights. With a shard of the layers, a layer is two calls, after each of
which the ranks add up what they have (`engine.shard`); with some of the layers only, it takes hidden states from the
stage before and gives them to the next (`engine.stage`).
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cluster.config import Kernels
from engine.decoder import Step
from engine.huge_pages import Arena
from engine.kv_cache import KVCache
from engine.model_config import ModelConfig
from engine.native.library import HeadPointers, LayerPointers, NativeUnavailable, Shape, StepPointers, load
from engine.native.packing import WORD_BYTES, packed, packed_bytes, packed_pairs, paired_bias
from engine.profiling import traced
from engine.rope import RotaryEmbedding
from engine.shard import Shard
from engine.stage import Stage
from engine.weights.base import Weights
from engine.weights.layers import LayerWeights, read_layer

DTYPES = (torch.float32, torch.bfloat16)
MAX_HEAD_DIM = 256
MAX_GROUP = 64
"""Query heads per key/value head; this and the above are sizes of buffers in attention.h."""


class NativeDecoder:
    """Implements `Decoder`. Raises `NativeUnavailable` where it can't run this model on this machine."""

    kernels = Kernels.NATIVE

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        cache: KVCache,
        threads: int,
        shard: Shard | None = None,
        stage: Stage | None = None,
    ) -> None:
        """With a `shard` or a `stage`, config, weights and cache are of this rank's part."""
        _require_supported(config, cache)
        library = load()
        dtype = cache.pool.dtype
        name = str(dtype).removeprefix("torch.")
        parts = ("layer",) if shard is None else ("mix", "transform")
        self._compute_parts = [library[f"baton_{part}_{name}"] for part in parts]
        self._compute_logits = library[f"baton_logits_{name}"]
        self._config = config
        self._shard = shard
        self._stage = stage
        self._cache = cache
        self._kept: list[Tensor] = []
        """What the pointers point to."""

        def read(name: str) -> Tensor:
            return weights.read(name).to(dtype)

        self._embedding = torch.empty(0, config.hidden_size, dtype=dtype)
        if stage is None or stage.reads_embedding:
            self._embedding = read("model.embed_tokens.weight")
        head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
        self._vocabulary = weights.shapes()[head][0] if stage is None or stage.last else 0
        """Rows of the head that are here."""
        self._weights = Arena(_weight_bytes(config, self._vocabulary, dtype.itemsize))
        self._pointers = [self._layer(read_layer(config, read, layer), layer) for layer in range(config.layers)]
        self._layers = [ctypes.byref(layer) for layer in self._pointers]
        self._rope = RotaryEmbedding(config.rope, config.head_dim, cache.pool.device)
        self._shape = Shape(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            page_size=cache.layout.page_size,
            epsilon=config.norm_epsilon,
            scale=config.head_dim**-0.5,
        )
        self._head = None
        if self._vocabulary:
            self._head = self._make_head(
                read("model.norm.weight"), self._embedding if config.tied_embeddings else read(head)
            )
        self.weight_bytes = self._embedding.nbytes + self._weights.used + sum(kept.nbytes for kept in self._kept)
        self._team = _make_team(library, threads)
        weakref.finalize(self, library.baton_team_destroy, self._team)
        self._spaces: list[_WorkSpace] = []
        """Of steps that are being computed, one within the other, and then of those that were."""
        self._depth = 0
        """Steps that are being computed."""
        self._sampled = self._embedding.new_empty(0, config.hidden_size)
        self._logits = torch.empty(0, self._vocabulary)

    def forward(self, step: Step, between_layers: Callable[[], None] = lambda: None) -> Tensor:
        step = step.read()
        space = self._space(self._depth)
        hidden, share = space.rows(len(step.tokens))
        self._enter(step, hidden)
        placed = self._place(step, space.pointers)
        shape, arguments = ctypes.byref(self._shape), ctypes.byref(space.pointers)
        self._depth += 1
        try:
            for layer in self._layers:
                for compute in self._compute_parts:
                    with traced("native layer"):
                        compute(self._team, shape, layer, arguments)
                    if self._shard is not None:
                        hidden.add_(self._shard.add_up(share))
                between_layers()
        finally:
            self._depth -= 1
        del placed
        if self._stage is not None and not self._stage.last:
            self._stage.leave(hidden)
            return torch.empty(0, self._config.vocab_size)
        with traced("native logits"):
            return self._logits_of(hidden, step)

    def warm_up(self, page: int, rows: int, running: int, context: int) -> None:
        """Nothing is made per size but the buffers."""
        self._space(0).rows(rows)
        self._sampling_space(running)

    def use(self, cache: KVCache) -> None:
        self._cache = cache
        for layer, pointers in enumerate(self._pointers):
            pointers.cache = cache.pool[:, :, layer].data_ptr()

    def _space(self, depth: int) -> _WorkSpace:
        if depth == len(self._spaces):
            self._spaces.append(_WorkSpace(self._config, self._cache, shares=self._shard is not None))
        return self._spaces[depth]

    def _enter(self, step: Step, hidden: Tensor) -> None:
        """Makes `hidden` what the first of our layers reads."""
        tokens = torch.from_numpy(step.tokens)
        if self._stage is not None and not self._stage.first:
            self._stage.enter(hidden)
        elif self._shard is None:
            torch.index_select(self._embedding, 0, tokens, out=hidden)
        else:
            hidden.copy_(self._shard.embed(self._embedding, tokens))

    def _place(self, step: Step, pointers: StepPointers) -> tuple[object, ...]:
        """Says where each row's KV goes and what it attends to. Valid as long as the result is held."""
        page_size = self._cache.layout.page_size
        pages: list[int] = []
        spans = []
        for span in step.spans:
            spans.append((span.row, span.start, span.stop, len(pages)))
            pages += span.pages[: -(-span.stop // page_size)]
        page_table, span_table = np.array(pages, dtype=np.int32), np.array(spans, dtype=np.int32)
        counts = span_table[:, 2] - span_table[:, 1]
        slots = np.empty((len(step.tokens), 2), dtype=np.int32)
        slots[:, 0] = page_table[step.positions // page_size + np.repeat(span_table[:, 3], counts)]
        slots[:, 1] = step.positions % page_size
        cosine, sine = self._rope.angles(torch.from_numpy(step.positions))
        pointers.rows, pointers.spans = len(step.tokens), len(step.spans)
        pointers.span, pointers.pages = span_table.ctypes.data, page_table.ctypes.data
        pointers.slots = slots.ctypes.data
        pointers.cosine, pointers.sine = cosine.data_ptr(), sine.data_ptr()
        return span_table, page_table, slots, cosine, sine

    def _logits_of(self, hidden: Tensor, step: Step) -> Tensor:
        sampled, logits = self._sampling_space(len(step.sampled))
        if len(step.sampled) == 0 or self._head is None:
            return logits.new_empty(0, self._config.vocab_size)
        torch.index_select(hidden, 0, torch.from_numpy(step.sampled), out=sampled)
        self._head.rows = len(step.sampled)
        self._head.hidden, self._head.logits = sampled.data_ptr(), logits.data_ptr()
        self._compute_logits(self._team, ctypes.byref(self._head))
        return logits if self._shard is None else self._shard.gather(logits)

    def _sampling_space(self, rows: int) -> tuple[Tensor, Tensor]:
        if rows > len(self._logits):
            self._sampled = self._embedding.new_empty(rows, self._config.hidden_size)
            self._logits = torch.empty(rows, self._vocabulary)
        return self._sampled[:rows], self._logits[:rows]

    def _keep(self, tensor: Tensor | None) -> int | None:
        """Its address, for as long as this decoder lives."""
        if tensor is None:
            return None
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _make_head(self, norm: Tensor, matrix: Tensor) -> HeadPointers:
        return HeadPointers(
            inputs=self._config.hidden_size,
            outputs=self._vocabulary,
            epsilon=self._config.norm_epsilon,
            norm=self._keep(norm),
            packed=self._weights.place(packed(matrix)),
        )

    def _layer(self, weights: LayerWeights, layer: int) -> LayerPointers:
        keep, place = self._keep, self._weights.place
        gate_up_bias = weights.gate_up.bias
        window = self._config.windows[layer] if self._config.windows else None
        return LayerPointers(
            attention_norm=keep(weights.norms.attention_norm),
            query_key_value=place(packed(weights.query_key_value.weight)),
            query_key_value_bias=keep(weights.query_key_value.bias),
            query_key_norm=keep(weights.norms.query_key_norm),
            output=place(packed(weights.output.weight)),
            output_bias=keep(weights.output.bias),
            mlp_norm=keep(weights.norms.mlp_norm),
            gate_up=place(packed_pairs(weights.gate_up.weight)),
            gate_up_bias=keep(None if gate_up_bias is None else paired_bias(gate_up_bias)),
            down=place(packed(weights.down.weight)),
            down_bias=keep(weights.down.bias),
            cache=self._cache.pool[:, :, layer].data_ptr(),
            window=window or 0,
        )


class _WorkSpace:
    """The buffers of one step, which grow with its rows, and the pointers to them."""

    def __init__(self, config: ModelConfig, cache: KVCache, *, shares: bool) -> None:
        """`shares`: with one for this rank's share of what is added to the residual stream."""
        self.pointers = StepPointers(page_stride=cache.pool.stride(0), head_stride=cache.pool.stride(1))
        self._config = config
        self._dtype = cache.pool.dtype
        self._hidden = self._share = torch.empty(0, config.hidden_size, dtype=self._dtype)
        self._shares = shares
        self._buffers: dict[str, Tensor] = {}

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` rows of the residual stream, and of the shares; the other buffers are at least as long."""
        if count > len(self._hidden):
            config, attended = self._config, self._config.heads * self._config.head_dim
            widths = {
                "hidden": config.hidden_size,
                "normed": config.hidden_size,
                "query_key_value": attended + 2 * config.kv_heads * config.head_dim,
                "attended": attended,
                "activated": config.intermediate_size,
            }
            if self._shares:
                widths["share"] = config.hidden_size
            self._buffers = {name: torch.empty(count, width, dtype=self._dtype) for name, width in widths.items()}
            self._hidden = self._buffers["hidden"]
            self._share = self._buffers.get("share", self._share)
            for name, buffer in self._buffers.items():
                setattr(self.pointers, name, buffer.data_ptr())
        return self._hidden[:count], self._share[:count]


def _weight_bytes(config: ModelConfig, vocabulary: int, item_bytes: int) -> int:
    """Of all packed weights, with `vocabulary` rows of the head."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    attended = config.heads * config.head_dim
    layer = (
        (attended + 2 * config.kv_heads * config.head_dim, hidden),
        (hidden, attended),
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
    )
    weights = [*(layer * config.layers), (vocabulary, hidden)]
    return sum(Arena.padded(packed_bytes(*shape, item_bytes)) for shape in weights)


def _make_team(library: ctypes.CDLL, threads: int) -> ctypes.c_void_p:
    """Compute threads, each on a core of its own where this process has as many cores as it is to have threads."""
    library.baton_team_create.restype = ctypes.c_void_p
    cores = sorted(os.sched_getaffinity(0))
    pinned = (ctypes.c_int * threads)(*cores) if len(cores) == threads else None
    return ctypes.c_void_p(library.baton_team_create(threads, pinned))


def _require_supported(config: ModelConfig, cache: KVCache) -> None:
    """Raises `NativeUnavailable` for a device, dtype or sizes that the kernels don't have."""
    pool = cache.pool
    if pool.device.type != "cpu" or pool.dtype not in DTYPES:
        raise NativeUnavailable(
            f"the native kernels compute float32 and bfloat16 on CPU, not {pool.dtype} on {pool.device}"
        )
    per_word = WORD_BYTES // pool.element_size()
    odd = [name for name in ("hidden_size", "intermediate_size", "head_dim") if getattr(config, name) % per_word]
    if odd:
        raise NativeUnavailable(f"the native kernels need an even {odd[0]} in bfloat16, not {getattr(config, odd[0])}")
    if config.head_dim > MAX_HEAD_DIM or config.heads // config.kv_heads > MAX_GROUP:
        raise NativeUnavailable(
            f"the native kernels compute heads of up to {MAX_HEAD_DIM}, at most {MAX_GROUP} with the same keys; this "
            f"model has {config.heads} of {config.head_dim}, and {config.kv_heads} heads of keys"
        )

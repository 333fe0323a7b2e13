"""The decoder in torch: any device, any dtype, all families of `engine.model_config`.

It computes a step's tokens of all sequences at once, as rows, padded to one of few sizes (`engine.shapes`); which row
belongs to whom only attention knows. As one rank of several it has a part of the weights: with a shard of the layers it
adds up with the others twice in each (`engine.shard`), with some of the layers only it takes hidden states from the
stage before and gives them to the next (`engine.stage`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from cluster.config import Attention, Kernels
from engine.attention.base import FixedAttention, StepAttention
from engine.attention.choice import make_attention
from engine.decoder import Integers, Step
from engine.kv_cache import KVCache
from engine.linear import Linear, PlainLinear, make_linear, nbytes_of
from engine.model_config import ModelConfig
from engine.operators.base import Rotation
from engine.operators.choice import make_operators
from engine.quantized_linear import make_quantized_linear
from engine.rope import RotaryEmbedding
from engine.shapes import ROWS, rounded, series
from engine.shard import Shard
from engine.stage import Stage
from engine.transit import to_device
from engine.weights.base import Weights
from engine.weights.layers import PROJECTIONS, LayerNorms, Read, read_bias, read_norms, read_projection, read_quantized


class _Layer(NamedTuple):
    norms: LayerNorms
    query_key_value: Linear
    output: Linear
    gate_up: Linear
    down: Linear


class _Head(NamedTuple):
    norm: Tensor
    product: Linear


class TorchDecoder:
    """Implements `Decoder`; no state between calls, nor between layers."""

    kernels = Kernels.TORCH

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        cache: KVCache,
        shard: Shard | None = None,
        attention: Attention = Attention.AUTO,
        stage: Stage | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        """With a `shard` or a `stage`, config, weights and cache are of this rank's part. `compiled`: operators go
        through torch.compile."""
        dtype, self.device = cache.dtype, cache.pool.device

        def read(name: str) -> Tensor:
            return weights.read(name).to(device=self.device, dtype=dtype)

        self.vocabulary = config.vocab_size
        self._config = config
        self._shard = shard
        self._stage = stage
        self._embedding = torch.empty(0, config.hidden_size, dtype=dtype, device=self.device)
        if stage is None or stage.reads_embedding:
            self._embedding = read("model.embed_tokens.weight")
        self._layers = []
        for layer in range(config.layers):
            products = {name: self._product(weights, read, layer, name) for name in PROJECTIONS}
            self._layers.append(_Layer(read_norms(config, read, layer), **products))
        self._head = self._read_head(read) if stage is None or stage.last else None
        self._rope = RotaryEmbedding(config.rope, config.head_dim, self.device)
        self.weight_bytes = self._count_bytes()
        self._operators = make_operators(attention, cache, config, self._rope, compiled=compiled)
        self._attention_wanted = attention
        self.use(cache)

    @property
    def alone(self) -> bool:
        """Whether no other rank has a part in its steps."""
        return self._shard is None and self._stage is None

    def forward(self, step: Step, between_layers: Callable[[], None] = lambda: None) -> Tensor:
        rows = rounded(len(step.tokens), ROWS)
        attention = self._attention.plan(step.spans, rows)
        hidden = self._layered(self._enter(step, rows), self._padded(step.positions, rows), attention, between_layers)
        if self._stage is not None and not self._stage.last:
            self._stage.leave(hidden[: len(step.tokens)])
        if len(step.sampled) == 0 or self._head is None:
            return hidden.new_empty((0, self._config.vocab_size), dtype=torch.float32)
        sampled = self._padded(step.sampled, rounded(len(step.sampled), ROWS))
        logits = self._logits(self._head, hidden.index_select(0, sampled))
        own = logits[: len(step.sampled)].float()
        return own if self._shard is None else self._shard.gather(own)

    def decode(self, tokens: Tensor, positions: Tensor, attention: FixedAttention) -> Tensor:
        """The logits of all rows, of the weights' dtype, where this rank is alone. The host has no part in it: a graph
        may keep it. `tokens` and `positions`: int64 [rows], on the device; rows are those of `attention`."""
        assert self._head is not None
        hidden = self._layered(self._embed(tokens), positions, attention, _nothing)
        return self._logits(self._head, hidden)

    def fixed_attention(self, sequences: int, context: int) -> FixedAttention | None:
        """See `AttentionBackend.fixed`."""
        return self._attention.fixed(sequences, context)

    def use(self, cache: KVCache) -> None:
        self.spare_page = cache.pages - 1
        """No sequence's: peers try on it whether they can write to us."""
        self._attention = make_attention(self._attention_wanted, cache, self._config.heads, self._config.windows)

    def warm_up(self, page: int, rows: int, running: int, context: int) -> None:
        for size in series(rows, ROWS):
            self._warm_up_products(size)
        if (head := self._head) is not None:
            for size in series(running, ROWS):
                head.product(self._embedding.new_zeros(size, self._config.hidden_size))
        self._attention.warm_up(page, context)

    def _warm_up_products(self, rows: int) -> None:
        """Those of one layer: the others' are of the same sizes."""
        config, layer = self._config, self._layers[0]
        hidden = self._embedding.new_zeros(rows, config.hidden_size)
        layer.query_key_value(hidden)
        layer.output.add_to(hidden, hidden.new_zeros(rows, config.heads * config.head_dim))
        layer.gate_up(hidden)
        layer.down.add_to(hidden, hidden.new_zeros(rows, config.intermediate_size))

    def _read_head(self, read: Read) -> _Head:
        weight = self._embedding if self._config.tied_embeddings else read("lm_head.weight")
        return _Head(read("model.norm.weight"), make_linear(weight))

    def _enter(self, step: Step, rows: int) -> Tensor:
        """[rows, hidden_size]: what the first of our layers reads."""
        if self._stage is not None and not self._stage.first:
            hidden = self._embedding.new_zeros(rows, self._config.hidden_size)
            self._stage.enter(hidden[: len(step.tokens)])
            return hidden
        tokens = self._padded(step.tokens, rows)
        return self._embed(tokens if step.unread is None else step.unread.put_into(tokens))

    def _layered(
        self, hidden: Tensor, positions: Tensor, attention: StepAttention, between_layers: Callable[[], None]
    ) -> Tensor:
        """What our layers make of `hidden`, which they use up."""
        rotation = self._operators.rotation(self._rope, positions, hidden.dtype)
        normed = self._operators.norm(hidden, self._layers[0].norms.attention_norm)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            query, key, value = self._query_key_value(layer, normed, rotation)
            attended = attention.attend(index, query, key, value)
            hidden, normed = self._add_norm(hidden, layer.output, attended.view(len(hidden), -1), layer.norms.mlp_norm)
            inner = self._operators.silu_mul(layer.gate_up(normed))
            if index < last:
                following = self._layers[index + 1].norms.attention_norm
                hidden, normed = self._add_norm(hidden, layer.down, inner, following)
            else:
                hidden = self._add(hidden, layer.down, inner)
            between_layers()
        return hidden

    def _logits(self, head: _Head, hidden: Tensor) -> Tensor:
        return head.product(self._operators.norm(hidden, head.norm))

    def _embed(self, tokens: Tensor) -> Tensor:
        if self._shard is None:
            return functional.embedding(tokens, self._embedding)
        return self._shard.embed(self._embedding, tokens)

    def _add(self, hidden: Tensor, linear: Linear, inputs: Tensor) -> Tensor:
        """`hidden` and what the product makes of the inputs, all ranks' together."""
        if self._shard is None:
            return linear.add_to(hidden, inputs)
        return self._shard.add_up(linear(inputs)).add_(hidden)

    def _add_norm(self, hidden: Tensor, linear: Linear, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and its norm."""
        if self._shard is None:
            return self._operators.product_add_norm(hidden, linear, inputs, weight)
        return self._operators.add_norm(hidden, self._shard.add_up(linear(inputs)), weight)

    def _product(self, weights: Weights, read: Read, layer: int, name: str) -> Linear:
        """One of `PROJECTIONS`. Quantised weights stay so on a GPU; on a CPU dequantised ones are faster, and exact."""
        config = self._config
        if self.device.type == "cuda" and (matrix := read_quantized(weights, layer, name)) is not None:
            bias = read_bias(config, read, layer, name)
            return make_quantized_linear(matrix.to(self.device), bias, self._embedding.dtype)
        return make_linear(*read_projection(config, read, layer, name))

    def _count_bytes(self) -> int:
        """Of all weights; a tied head may be the embedding itself, or packed into memory of its own."""
        products = [product for layer in self._layers for product in layer[1:]]
        others = [norm for layer in self._layers for norm in layer.norms] + [self._embedding]
        if self._head is not None:
            others.append(self._head.norm)
            if not (self._config.tied_embeddings and isinstance(self._head.product, PlainLinear)):
                products.append(self._head.product)
        return sum(product.nbytes for product in products) + sum(map(nbytes_of, others))

    def _padded(self, values: Integers, size: int) -> Tensor:
        """The values, then zeros: int64 [size]."""
        padded = np.zeros(size, dtype=np.int64)
        padded[: len(values)] = values
        return to_device(torch.from_numpy(padded), self.device)

    def _query_key_value(self, layer: _Layer, inputs: Tensor, rotation: Rotation) -> tuple[Tensor, ...]:
        """[rows, heads, head_dim], and twice [rows, kv_heads, head_dim]"""
        heads, kv_heads, head_dim = self._config.heads, self._config.kv_heads, self._config.head_dim
        fused = layer.query_key_value(inputs).view(len(inputs), heads + 2 * kv_heads, head_dim)
        query_key, value = torch.split(fused, [heads + kv_heads, kv_heads], 1)
        if layer.norms.query_key_norm is not None:
            query_key = functional.rms_norm(query_key, (head_dim,), None, self._config.norm_epsilon)
            query_key = query_key * layer.norms.query_key_norm
        query, key = torch.split(self._operators.rotate(query_key, heads, rotation), [heads, kv_heads], 1)
        return query, key, value


def _nothing() -> None:
    """Between two layers, where the host is not."""

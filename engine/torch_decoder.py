"""The decoder in torch: any device, any dtype, all families of `engine.model_config`.

It computes a step's tokens of all sequences at once, as rows, padded to one of few sizes (`engine.shapes`); which row
belongs to whom only attention knows. As one rank of several it has a part of the weights, and adds up with the others
twice in each layer (`engine.shard`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from cluster.config import Attention, Kernels
from engine.attention.choice import make_attention
from engine.decoder import Integers, Step
from engine.kv_cache import KVCache
from engine.linear import Linear, PlainLinear, make_linear, nbytes_of
from engine.model_config import ModelConfig
from engine.quantized_linear import make_quantized_linear
from engine.rope import RotaryEmbedding, rotate
from engine.shapes import ROWS, rounded, series
from engine.shard import Shard
from engine.weights.base import Weights
from engine.weights.layers import PROJECTIONS, LayerNorms, Read, read_bias, read_norms, read_projection, read_quantized


class _Layer(NamedTuple):
    norms: LayerNorms
    query_key_value: Linear
    output: Linear
    gate_up: Linear
    down: Linear


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
    ) -> None:
        """With a `shard`, all three are of this rank's part."""
        dtype, self._device = cache.dtype, cache.pool.device

        def read(name: str) -> Tensor:
            return weights.read(name).to(device=self._device, dtype=dtype)

        self._config = config
        self._shard = shard
        self._embedding = read("model.embed_tokens.weight")
        self._layers = []
        for layer in range(config.layers):
            products = {name: self._product(weights, read, layer, name) for name in PROJECTIONS}
            self._layers.append(_Layer(read_norms(config, read, layer), **products))
        self._norm = read("model.norm.weight")
        self._head = make_linear(self._embedding if config.tied_embeddings else read("lm_head.weight"))
        self._rope = RotaryEmbedding(config.rope, config.head_dim, self._device)
        self.weight_bytes = self._count_bytes()
        self._attention_wanted = attention
        self.use(cache)

    def forward(self, step: Step, between_layers: Callable[[], None] = lambda: None) -> Tensor:
        rows = rounded(len(step.tokens), ROWS)
        attention = self._attention.plan(step.spans, rows)
        hidden = self._embed(self._padded(step.tokens, rows))
        rope = self._rope.tables(self._padded(step.positions, rows), hidden.dtype)
        for index, layer in enumerate(self._layers):
            query, key, value = self._query_key_value(layer, self._normed(hidden, layer.norms.attention_norm), rope)
            attended = attention.attend(index, query, key, value)
            hidden = self._add(hidden, layer.output, attended.view(rows, -1))
            gate, up = layer.gate_up(self._normed(hidden, layer.norms.mlp_norm)).chunk(2, -1)
            hidden = self._add(hidden, layer.down, functional.silu(gate).mul_(up))
            between_layers()
        if len(step.sampled) == 0:
            return hidden.new_empty((0, self._config.vocab_size), dtype=torch.float32)
        sampled = self._padded(step.sampled, rounded(len(step.sampled), ROWS))
        logits = self._head(self._normed(hidden.index_select(0, sampled), self._norm))
        own = logits[: len(step.sampled)].float()
        return own if self._shard is None else self._shard.gather(own)

    def use(self, cache: KVCache) -> None:
        self._attention = make_attention(self._attention_wanted, cache, self._config.heads, self._config.windows)

    def warm_up(self, page: int, rows: int, running: int, context: int) -> None:
        for size in series(rows, ROWS):
            self._warm_up_products(size)
        for size in series(running, ROWS):
            self._head(self._embedding.new_zeros(size, self._config.hidden_size))
        self._attention.warm_up(page, context)

    def _warm_up_products(self, rows: int) -> None:
        """Those of one layer: the others' are of the same sizes."""
        config, layer = self._config, self._layers[0]
        hidden = self._embedding.new_zeros(rows, config.hidden_size)
        layer.query_key_value(hidden)
        layer.output.add_to(hidden, hidden.new_zeros(rows, config.heads * config.head_dim))
        layer.gate_up(hidden)
        layer.down.add_to(hidden, hidden.new_zeros(rows, config.intermediate_size))

    def _embed(self, tokens: Tensor) -> Tensor:
        if self._shard is None:
            return functional.embedding(tokens, self._embedding)
        return self._shard.embed(self._embedding, tokens)

    def _add(self, hidden: Tensor, linear: Linear, inputs: Tensor) -> Tensor:
        """`hidden` and what the product makes of the inputs, all ranks' together."""
        if self._shard is None:
            return linear.add_to(hidden, inputs)
        return self._shard.add_up(linear(inputs)).add_(hidden)

    def _product(self, weights: Weights, read: Read, layer: int, name: str) -> Linear:
        """One of `PROJECTIONS`. Quantised weights stay so on a GPU; on a CPU dequantised ones are faster, and exact."""
        config = self._config
        if self._device.type == "cuda" and (matrix := read_quantized(weights, layer, name)) is not None:
            bias = read_bias(config, read, layer, name)
            return make_quantized_linear(matrix.to(self._device), bias, self._embedding.dtype)
        return make_linear(*read_projection(config, read, layer, name))

    def _count_bytes(self) -> int:
        """Of all weights; a tied head may be the embedding itself, or packed into memory of its own."""
        shared = self._config.tied_embeddings and isinstance(self._head, PlainLinear)
        products = [product for layer in self._layers for product in layer[1:]]
        norms = [norm for layer in self._layers for norm in layer.norms] + [self._norm, self._embedding]
        total = sum(product.nbytes for product in products) + sum(map(nbytes_of, norms))
        return total + (0 if shared else self._head.nbytes)

    def _padded(self, values: Integers, size: int) -> Tensor:
        """The values, then zeros: int64 [size]."""
        padded = np.zeros(size, dtype=np.int64)
        padded[: len(values)] = values
        return torch.from_numpy(padded).to(self._device)

    def _query_key_value(self, layer: _Layer, inputs: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """[rows, heads, head_dim], and twice [rows, kv_heads, head_dim]"""
        heads, kv_heads, head_dim = self._config.heads, self._config.kv_heads, self._config.head_dim
        fused = layer.query_key_value(inputs).view(len(inputs), heads + 2 * kv_heads, head_dim)
        query_key, value = torch.split(fused, [heads + kv_heads, kv_heads], 1)
        if layer.norms.query_key_norm is not None:
            query_key = functional.rms_norm(query_key, (head_dim,), None, self._config.norm_epsilon)
            query_key = query_key * layer.norms.query_key_norm
        query, key = torch.split(rotate(query_key, *rope), [heads, kv_heads], 1)
        return query, key, value

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self._config.norm_epsilon)

"""The decoder: embeddings, layers, head. One class for all families of `engine.model_config`.

It computes a step's tokens of all sequences at once, as rows; which row belongs to whom only attention knows. Weights
that read the same input are fused into one product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

from engine.attention.base import StepAttention
from engine.linear import Linear, make_linear
from engine.model_config import ModelConfig
from engine.rope import RotaryEmbedding, rotate
from engine.weights.base import Weights

Read = Callable[[str], Tensor]
"""Parameter name -> the parameter, of the model's dtype and on its device."""


class _Layer(NamedTuple):
    attention_norm: Tensor
    query_key_value: Linear
    query_key_norm: Tensor | None
    """[heads + kv_heads, head_dim]"""
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Weights on one device, in one dtype; no state between calls."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        def read(name: str) -> Tensor:
            return weights.read(name).to(device=device, dtype=dtype)

        self._config = config
        self._embedding = read("model.embed_tokens.weight")
        self._layers = [_read_layer(config, read, f"model.layers.{layer}.") for layer in range(config.layers)]
        self._norm = read("model.norm.weight")
        self._head = make_linear(self._embedding if config.tied_embeddings else read("lm_head.weight"))
        self._rope = RotaryEmbedding(config.rope, config.head_dim, device)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: StepAttention,
        rows: Tensor,
        between_layers: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The float32 logits [len(rows), vocabulary] of those `rows`: only they go through the head.

        `tokens` and `positions` are [rows of the step], int64, in the order that `attention` was planned for.
        `between_layers` is called after each layer: a long prompt's step takes a good part of a second.
        """
        hidden = functional.embedding(tokens, self._embedding)
        rope = self._rope.tables(positions, hidden.dtype)
        for index, layer in enumerate(self._layers):
            query, key, value = self._query_key_value(layer, self._normed(hidden, layer.attention_norm), rope)
            attended = attention.attend(index, query, key, value)
            hidden = layer.output.add_to(hidden, attended.view(len(tokens), -1))
            gate, up = layer.gate_up(self._normed(hidden, layer.mlp_norm)).chunk(2, -1)
            hidden = layer.down.add_to(hidden, functional.silu(gate).mul_(up))
            between_layers()
        if len(rows) == 0:
            return hidden.new_empty((0, self._config.vocab_size), dtype=torch.float32)
        return self._head(self._normed(hidden.index_select(0, rows), self._norm)).float()

    def warm_up(self, rows: int) -> None:
        """Computes the products of one layer for so many rows: the others' are of the same sizes."""
        config, layer = self._config, self._layers[0]
        hidden = self._embedding.new_zeros(rows, config.hidden_size)
        layer.query_key_value(hidden)
        layer.output.add_to(hidden, hidden.new_zeros(rows, config.heads * config.head_dim))
        layer.gate_up(hidden)
        layer.down.add_to(hidden, hidden.new_zeros(rows, config.intermediate_size))

    def warm_up_head(self, rows: int) -> None:
        self._head(self._embedding.new_zeros(rows, self._config.hidden_size))

    def _query_key_value(self, layer: _Layer, inputs: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """[rows, heads, head_dim], and twice [rows, kv_heads, head_dim]"""
        heads, kv_heads, head_dim = self._config.heads, self._config.kv_heads, self._config.head_dim
        fused = layer.query_key_value(inputs).view(len(inputs), heads + 2 * kv_heads, head_dim)
        query_key, value = torch.split(fused, [heads + kv_heads, kv_heads], 1)
        if layer.query_key_norm is not None:
            query_key = functional.rms_norm(query_key, (head_dim,), None, self._config.norm_epsilon)
            query_key = query_key * layer.query_key_norm
        query, key = torch.split(rotate(query_key, *rope), [heads, kv_heads], 1)
        return query, key, value

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self._config.norm_epsilon)


def _read_layer(config: ModelConfig, read: Read, prefix: str) -> _Layer:
    def linear(bias: bool, *names: str) -> Linear:
        """One product for all of them: their outputs side by side."""
        weight = torch.cat([read(f"{prefix}{name}.weight") for name in names])
        return make_linear(weight, torch.cat([read(f"{prefix}{name}.bias") for name in names]) if bias else None)

    query_key_norm = None
    if config.query_key_norm:
        query_norm, key_norm = (read(f"{prefix}self_attn.{name}_norm.weight") for name in "qk")
        query_key_norm = torch.cat((query_norm.expand(config.heads, -1), key_norm.expand(config.kv_heads, -1)))
    return _Layer(
        attention_norm=read(f"{prefix}input_layernorm.weight"),
        query_key_value=linear(config.qkv_bias, *(f"self_attn.{name}_proj" for name in "qkv")),
        query_key_norm=query_key_norm,
        output=linear(config.output_bias, "self_attn.o_proj"),
        mlp_norm=read(f"{prefix}post_attention_layernorm.weight"),
        gate_up=linear(config.mlp_bias, "mlp.gate_proj", "mlp.up_proj"),
        down=linear(config.mlp_bias, "mlp.down_proj"),
    )

"""A decoder layer's parameters, read and fused: weights that read the same input are one matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.model_config import ModelConfig
from engine.weights.base import Weights
from engine.weights.quantized.matrix import QuantizedMatrix, stacked

Read = Callable[[str], Tensor]
"""Parameter name -> the parameter, of the model's dtype and on its device."""


PROJECTIONS = {
    "query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The products of a layer, and the matrices that each consists of."""


class Projection(NamedTuple):
    """weight [outputs, inputs], bias [outputs]: of several products side by side."""

    weight: Tensor
    bias: Tensor | None


class LayerNorms(NamedTuple):
    attention_norm: Tensor
    query_key_norm: Tensor | None
    """[heads + kv_heads, head_dim]"""
    mlp_norm: Tensor


class LayerWeights(NamedTuple):
    norms: LayerNorms
    query_key_value: Projection
    output: Projection
    gate_up: Projection
    """All of gate, then all of up."""
    down: Projection


def read_layer(config: ModelConfig, read: Read, layer: int) -> LayerWeights:
    """The parameters of layer number `layer`, by Hugging Face's names."""
    projections = {name: read_projection(config, read, layer, name) for name in PROJECTIONS}
    return LayerWeights(read_norms(config, read, layer), **projections)


def read_norms(config: ModelConfig, read: Read, layer: int) -> LayerNorms:
    prefix = f"model.layers.{layer}."
    query_key_norm = None
    if config.query_key_norm:
        query_norm, key_norm = (read(f"{prefix}self_attn.{name}_norm.weight") for name in "qk")
        query_key_norm = torch.cat((query_norm.expand(config.heads, -1), key_norm.expand(config.kv_heads, -1)))
    norms = (read(f"{prefix}{name}_layernorm.weight") for name in ("input", "post_attention"))
    return LayerNorms(next(norms), query_key_norm, next(norms))


def read_projection(config: ModelConfig, read: Read, layer: int, name: str) -> Projection:
    """One of `PROJECTIONS`."""
    weights = [read(f"model.layers.{layer}.{part}.weight") for part in PROJECTIONS[name]]
    return Projection(torch.cat(weights), read_bias(config, read, layer, name))


def read_bias(config: ModelConfig, read: Read, layer: int, name: str) -> Tensor | None:
    """Of one of `PROJECTIONS`."""
    biased = {"query_key_value": config.qkv_bias, "output": config.output_bias}
    if not biased.get(name, config.mlp_bias):
        return None
    return torch.cat([read(f"model.layers.{layer}.{part}.bias") for part in PROJECTIONS[name]])


def read_quantized(weights: Weights, layer: int, name: str) -> QuantizedMatrix | None:
    """The weight of one of `PROJECTIONS` as it is stored; None if it is plain, or can't be put together."""
    parts = (weights.quantized(f"model.layers.{layer}.{part}.weight") for part in PROJECTIONS[name])
    matrices = [matrix for matrix in parts if matrix is not None]
    return stacked(matrices) if len(matrices) == len(PROJECTIONS[name]) else None

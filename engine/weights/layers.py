"""A decoder layer's parameters, read and fused: weights that read the same input are one matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.model_config import ModelConfig

Read = Callable[[str], Tensor]
"""Parameter name -> the parameter, of the model's dtype and on its device."""


class Projection(NamedTuple):
    """weight [outputs, inputs], bias [outputs]: of several products side by side."""

    weight: Tensor
    bias: Tensor | None


class LayerWeights(NamedTuple):
    attention_norm: Tensor
    query_key_value: Projection
    query_key_norm: Tensor | None
    """[heads + kv_heads, head_dim]"""
    output: Projection
    mlp_norm: Tensor
    gate_up: Projection
    """All of gate, then all of up."""
    down: Projection


def read_layer(config: ModelConfig, read: Read, layer: int) -> LayerWeights:
    """The parameters of layer number `layer`, by Hugging Face's names."""
    prefix = f"model.layers.{layer}."

    def projection(bias: bool, *names: str) -> Projection:
        weight = torch.cat([read(f"{prefix}{name}.weight") for name in names])
        return Projection(weight, torch.cat([read(f"{prefix}{name}.bias") for name in names]) if bias else None)

    query_key_norm = None
    if config.query_key_norm:
        query_norm, key_norm = (read(f"{prefix}self_attn.{name}_norm.weight") for name in "qk")
        query_key_norm = torch.cat((query_norm.expand(config.heads, -1), key_norm.expand(config.kv_heads, -1)))
    return LayerWeights(
        attention_norm=read(f"{prefix}input_layernorm.weight"),
        query_key_value=projection(config.qkv_bias, *(f"self_attn.{name}_proj" for name in "qkv")),
        query_key_norm=query_key_norm,
        output=projection(config.output_bias, "self_attn.o_proj"),
        mlp_norm=read(f"{prefix}post_attention_layernorm.weight"),
        gate_up=projection(config.mlp_bias, "mlp.gate_proj", "mlp.up_proj"),
        down=projection(config.mlp_bias, "mlp.down_proj"),
    )

"""Rotary position embedding: rotates each pair (x[i], x[i + head_dim / 2]) of a head by position * frequency[i].

Source: Su et al., RoFormer (arXiv:2104.09864), in the half-split layout of Hugging Face checkpoints. Scalings: linear
(Chen et al., arXiv:2306.15595), YaRN (Peng et al., arXiv:2309.00071), Llama 3's wavelength bands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.model_config import RopeConfig, RopeKind


class RotaryEmbedding:
    """Makes the tables of a step once, for all its layers."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        frequencies, self._attention_factor = inverse_frequencies(config, head_dim)
        self._frequencies = frequencies.to(device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [tokens, head_dim / 2] in float32. `positions` is [tokens]."""
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        return angles.cos() * self._attention_factor, angles.sin() * self._attention_factor

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and signed sine, each [tokens, 1, head_dim] of `dtype`, for `rotate`. `positions` is [tokens]."""
        cosine, sine = (table[:, None] for table in self.angles(positions))
        return torch.cat((cosine, cosine), -1).to(dtype), torch.cat((-sine, sine), -1).to(dtype)


def rotate(heads: Tensor, cosine: Tensor, signed_sine: Tensor) -> Tensor:
    """`heads` [tokens, heads, head_dim], rotated; a new tensor."""
    # Rolling by half a head swaps the halves; the sine's sign makes it the (-x2, x1) of the rotation.
    return torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, -1), signed_sine)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position, [head_dim / 2] in float32, and the factor of cosine and sine."""
    plain = 1.0 / (config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if config.kind is RopeKind.PLAIN:
        return plain, 1.0
    if config.kind is RopeKind.LINEAR:
        return plain / config.factor, 1.0
    if config.kind is RopeKind.DIVISORS:
        return plain / torch.tensor(config.divisors, dtype=torch.float32), 1.0
    if config.kind is RopeKind.LLAMA3:
        return _llama3(plain, config), 1.0
    return _yarn(plain, config, head_dim), _yarn_attention_factor(config)


def _llama3(plain: Tensor, config: RopeConfig) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / plain
    low, high = config.low_frequency_factor, config.high_frequency_factor
    kept = ((config.original_context / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * plain / config.factor + kept * plain


def _yarn(plain: Tensor, config: RopeConfig, head_dim: int) -> Tensor:
    """Dimensions that turn often within the original context are kept, slow ones stretched, a ramp between."""

    def dimension(turns: float) -> float:
        context = config.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(context) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # A ramp of no width would divide by zero.
    width = high - low or 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return stretched * plain / config.factor + (1 - stretched) * plain


def _yarn_attention_factor(config: RopeConfig) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return scale(config.mscale) / scale(config.mscale_all_dim)
    return scale(1.0)

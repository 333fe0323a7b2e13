"""Random weights in the shape of a config: for load tests of models that nobody has to download."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from engine.model_config import ModelConfig
from engine.weights.base import Part, Shape, identity_of, parameter_shapes

SCALE = 0.02
"""Standard deviation; that of transformers' initialisation."""


class DummyWeights:
    """Implements `Checkpoint`. The same on every machine: each parameter's seed is a digest of its name."""

    precision = "no weights"

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = parameter_shapes(config)
        self.identity = f"dummy-{identity_of(config)}"

    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def stored_bytes(self) -> Mapping[str, int]:
        return {}

    def kept_bytes(self) -> Mapping[str, int]:
        return {}

    def read(self, name: str, part: Part | None = None) -> Tensor:
        whole = self._whole(name)
        return whole if part is None else part.of(whole)

    def _whole(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * SCALE

    def quantized(self, name: str) -> None:
        return None

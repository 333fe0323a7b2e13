"""One stage's part of a model: some of its layers, one after the other.

The first stage embeds the tokens, the last one has the head; hidden states go from each to the next (`engine.line`). To
a decoder, a stage is a model of so many layers. Its shards (`engine.shard`) divide those among them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from torch import Tensor

from cluster.errors import ConfigError
from cluster.shards import layers_of
from engine.line import Line
from engine.model_config import ModelConfig
from engine.weights.base import Part, Shape, Weights
from engine.weights.quantized.matrix import QuantizedMatrix

_LAYER = re.compile(r"(?<=^model\.layers\.)\d+(?=\.)")


class Stage:
    """Stage `line.stage`'s part of a model of `config`. Raises `ConfigError` if a stage would have no layer."""

    def __init__(self, config: ModelConfig, line: Line) -> None:
        if line.stages > config.layers:
            raise ConfigError(f"pipeline_parallel: {line.stages} stages can't share the model's {config.layers} layers")
        self.line = line
        self.first = line.stage == 0
        self.last = line.stage == line.stages - 1
        self.layers = layers_of(config.layers, line.stages, line.stage)
        windows = config.windows[self.layers.start : self.layers.stop]
        self.config = msgspec.structs.replace(config, layers=len(self.layers), windows=windows)
        """As if its layers were all there are."""
        self.reads_embedding = self.first or (self.last and config.tied_embeddings)

    def enter(self, hidden: Tensor) -> Tensor:
        """Makes `hidden`, [rows, hidden_size], what the stage before gives."""
        self.line.receive(hidden)
        return hidden

    def leave(self, hidden: Tensor) -> None:
        """Gives [rows, hidden_size] to the next stage."""
        self.line.send(hidden)


class StageWeights:
    """Implements `Weights`: of `weights` those that `stage` has, its layers counted from 0."""

    def __init__(self, weights: Weights, stage: Stage) -> None:
        self.identity = weights.identity
        self._weights = weights
        self._stage = stage

    def shapes(self) -> Mapping[str, Shape]:
        return {
            own: shape for name, shape in self._weights.shapes().items() if (own := self._own_name(name)) is not None
        }

    def read(self, name: str, part: Part | None = None) -> Tensor:
        return self._weights.read(self._whole_name(name), part)

    def quantized(self, name: str) -> QuantizedMatrix | None:
        return self._weights.quantized(self._whole_name(name))

    def _whole_name(self, name: str) -> str:
        """What the whole model calls it."""
        return _LAYER.sub(lambda layer: str(int(layer[0]) + self._stage.layers.start), name)

    def _own_name(self, name: str) -> str | None:
        """What this stage calls it; None: it does not have it."""
        stage, found = self._stage, _LAYER.search(name)
        if found is not None:
            layer = int(found[0])
            return _LAYER.sub(str(layer - stage.layers.start), name) if layer in stage.layers else None
        if name.startswith("model.embed_tokens."):
            return name if stage.reads_embedding else None
        return name if stage.last else None

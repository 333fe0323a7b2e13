"""One rank's part of a model: its heads, its share of each MLP, its rows of the vocabulary.

Weights that make heads, or the MLP's inner values, are divided by outputs; those that take them in, by inputs: what
they give is a share, and the sum over all ranks is the layer's. So a layer has two sums over ranks. (Shoeybi et al.,
Megatron-LM, arXiv:1909.08053.)
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.shards import even_range, key_value_heads, query_heads
from engine.group import Group
from engine.model_config import ModelConfig
from engine.weights.base import Part, Shape, Weights
from engine.weights.quantized.matrix import QuantizedMatrix

INNER_UNIT = 32
"""Inner values of an MLP are divided in such blocks: those of quantised checkpoints are of so many, or of multiples."""
VOCABULARY_UNIT = 16


class Shard:
    """Rank `group.rank`'s part of a model of `config`. Raises `ConfigError` if a rank would have no query head."""

    def __init__(self, config: ModelConfig, group: Group) -> None:
        ranks, rank = group.size, group.rank
        if ranks > config.heads:
            raise ConfigError(f"tensor_parallel: {ranks} ranks can't share the model's {config.heads} query heads")
        self.group = group
        self.query_heads = query_heads(config.heads, config.kv_heads, ranks, rank)
        self.kv_heads = key_value_heads(config.kv_heads, ranks, rank)
        self.inner = even_range(config.intermediate_size, ranks, rank, INNER_UNIT)
        self.config = msgspec.structs.replace(
            config, heads=len(self.query_heads), kv_heads=len(self.kv_heads), intermediate_size=len(self.inner)
        )
        """As if this rank's heads and inner values were all there are; the vocabulary is whole."""
        self.vocabularies = [even_range(config.vocab_size, ranks, other, VOCABULARY_UNIT) for other in range(ranks)]
        self.vocabulary = self.vocabularies[rank]

    def add_up(self, share: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        self.group.add_up(share)
        return share

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        """Rows of the whole embedding; `table` has those of our vocabulary only."""
        rows = tokens - self.vocabulary.start
        elsewhere = (rows < 0) | (rows >= len(self.vocabulary))
        embedded = table.index_select(0, rows.masked_fill_(elsewhere, 0))
        return self.add_up(embedded.masked_fill_(elsewhere[:, None], 0))

    def gather(self, logits: Tensor) -> Tensor:
        """Of the whole vocabulary, on rank 0. `logits` are those of ours."""
        return self.group.gather(logits, [len(rows) for rows in self.vocabularies])


class ShardedWeights:
    """Implements `Weights`: of each parameter of `weights`, what rank `shard.group.rank` has."""

    def __init__(self, weights: Weights, shard: Shard) -> None:
        self.identity = weights.identity
        self._weights = weights
        self._shard = shard

    def shapes(self) -> Mapping[str, Shape]:
        return {name: self._shape(name, shape) for name, shape in self._weights.shapes().items()}

    def read(self, name: str, part: Part | None = None) -> Tensor:
        if self._is_added_once(name) and self._shard.group.rank > 0:
            return torch.zeros(self._weights.shapes()[name])
        own = self._part(name)
        if own is None or part is None:
            return self._weights.read(name, own or part)
        return part.of(self._weights.read(name, own))

    def quantized(self, name: str) -> QuantizedMatrix | None:
        matrix, own = self._weights.quantized(name), self._part(name)
        return matrix if matrix is None or own is None else own.of_matrix(matrix)

    def _shape(self, name: str, shape: Shape) -> Shape:
        own = self._part(name)
        return shape if own is None else own.shape(shape)

    def _part(self, name: str) -> Part | None:
        """None: all of it."""
        module, _, kind = name.rpartition(".")
        module = module.rpartition(".")[2]
        shard = self._shard
        if module in ("embed_tokens", "lm_head"):
            return _part(0, shard.vocabulary)
        if module in ("gate_proj", "up_proj"):
            return _part(0, shard.inner)
        if module in ("q_proj", "k_proj", "v_proj"):
            return _part(0, self._values(shard.query_heads if module == "q_proj" else shard.kv_heads))
        if kind == "weight" and module == "o_proj":
            return _part(1, self._values(shard.query_heads))
        if kind == "weight" and module == "down_proj":
            return _part(1, shard.inner)
        return None

    def _values(self, heads: range) -> range:
        size = self._shard.config.head_dim
        return range(heads.start * size, heads.stop * size)

    @staticmethod
    def _is_added_once(name: str) -> bool:
        """A bias of a product whose results are added up over the ranks."""
        return name.endswith(("o_proj.bias", "down_proj.bias"))


def _part(axis: int, indices: range) -> Part:
    return Part(axis, indices.start, indices.stop)

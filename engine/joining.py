"""A rank's part in its worker: how it meets the others, and which layers and heads it has."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cluster.config import Switch
from cluster.ranks import Rank
from cluster.shards import Grid
from engine.group import Group, TorchGroup
from engine.line import Line, TorchLine
from engine.model_config import ModelConfig
from engine.shard import Shard
from engine.stage import Stage


class Parts(NamedTuple):
    """What a rank has of its worker's model; it is all, where all three are None."""

    everyone: Group | None
    """All ranks of the worker."""
    stage: Stage | None
    """With some of the layers."""
    shard: Shard | None
    """Of the stage, or of the whole model."""

    @property
    def line(self) -> Line | None:
        return None if self.stage is None else self.stage.line


def join_ranks(
    config: ModelConfig, grid: Grid, rank: Rank, device: torch.device, symmetric: Switch = Switch.NEVER
) -> Parts:
    """Returns when all ranks of `grid` are here. Raises `ConfigError` if they don't come together, or can't share a
    model of this config."""
    if rank.size == 1:
        return Parts(None, None, None)
    everyone = TorchGroup(rank.number, rank.size, rank.rendezvous, device)
    if grid.stages == 1:
        everyone.open_symmetric(device, symmetric)
        return Parts(everyone, None, Shard(config, everyone))
    stage = Stage(config, TorchLine(grid, rank.number, config.vocab_size, device))
    if grid.shards == 1:
        return Parts(everyone, stage, None)
    shards = everyone.split(grid.shards)
    shards.open_symmetric(device, symmetric)
    return Parts(everyone, stage, Shard(stage.config, shards))

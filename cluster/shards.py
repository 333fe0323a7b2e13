"""Which rank of a worker has what of the model: layers, heads, shares. Pure arithmetic, the same everywhere.

The layers are divided among stages, one after the other; the heads of a stage's layers among its shards, side by side.
All have contiguous ranges, as even as whole layers and heads allow: three key/value heads are 2 + 1 on two shards.
Query heads go with the key/value head that they read. On more shards than there are key/value heads, some have the same
one, and share its query heads.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple


class Grid(NamedTuple):
    """The ranks of one worker, numbered stage by stage: rank = stage * shards + shard."""

    shards: int = 1
    stages: int = 1

    @property
    def ranks(self) -> int:
        return self.stages * self.shards

    def rank(self, stage: int, shard: int) -> int:
        return stage * self.shards + shard

    def stage_of(self, rank: int) -> int:
        return rank // self.shards

    def shard_of(self, rank: int) -> int:
        return rank % self.shards


def layers_of(layers: int, stages: int, stage: int) -> range:
    """The layers of a stage; the first stages have one more where they don't come out even, since the last one has the
    head, too. Empty only where there are more stages than layers."""
    return even_range(layers, stages, stage)


def even_range(total: int, shards: int, rank: int, unit: int = 1) -> range:
    """Rank `rank`'s part of `total` things, in blocks of `unit`, or of as much of it as divides `total`, if there are
    enough of these; the first ranks have a block more where they don't come out even."""
    unit = gcd(total, unit)
    if total // unit < shards:
        unit = 1
    each, left = divmod(total // unit, shards)
    begin = rank * each + min(rank, left)
    return range(begin * unit, (begin + each + (rank < left)) * unit)


def key_value_heads(kv_heads: int, shards: int, rank: int) -> range:
    """The key/value heads of shard `rank`; at least one."""
    if shards <= kv_heads:
        return even_range(kv_heads, shards, rank)
    head = rank * kv_heads // shards
    return range(head, head + 1)


def holders(kv_heads: int, shards: int, head: int) -> list[int]:
    """The shards that have key/value head `head`: one, or more where heads are fewer than shards."""
    return [rank for rank in range(shards) if head in key_value_heads(kv_heads, shards, rank)]


def query_heads(heads: int, kv_heads: int, shards: int, rank: int) -> range:
    """The query heads of shard `rank`; empty only where there are more shards than query heads."""
    group = heads // kv_heads
    own = key_value_heads(kv_heads, shards, rank)
    sharing = holders(kv_heads, shards, own.start)
    if len(sharing) == 1:
        return range(own.start * group, own.stop * group)
    part = even_range(group, len(sharing), sharing.index(rank))
    return range(own.start * group + part.start, own.start * group + part.stop)

"""Who of a tensor-parallel group has what: heads, and shares of other dimensions. Pure arithmetic, the same everywhere.

Ranks have contiguous ranges, as even as whole heads allow: three key/value heads are 2 + 1 on two ranks. Query heads go
with the key/value head that they read. On more ranks than there are key/value heads, some ranks have the same one, and
share its query heads.
"""

from __future__ import annotations

from math import gcd


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
    """The key/value heads of rank `rank`; at least one."""
    if shards <= kv_heads:
        return even_range(kv_heads, shards, rank)
    head = rank * kv_heads // shards
    return range(head, head + 1)


def holders(kv_heads: int, shards: int, head: int) -> list[int]:
    """The ranks that have key/value head `head`: one, or more where heads are fewer than ranks."""
    return [rank for rank in range(shards) if head in key_value_heads(kv_heads, shards, rank)]


def query_heads(heads: int, kv_heads: int, shards: int, rank: int) -> range:
    """The query heads of rank `rank`; empty only where there are more ranks than query heads."""
    group = heads // kv_heads
    own = key_value_heads(kv_heads, shards, rank)
    sharing = holders(kv_heads, shards, own.start)
    if len(sharing) == 1:
        return range(own.start * group, own.stop * group)
    part = even_range(group, len(sharing), sharing.index(rank))
    return range(own.start * group + part.start, own.start * group + part.stop)

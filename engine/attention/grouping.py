"""Which sequences of a step attend together, as one padded batch. Pure.

Padding costs work, a batch of its own costs calls. Sequences are sorted by size and joined to the current group until
its padding would cost more than another group does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

PADDED_KEYS = 512
"""Padded keys (and values) to gather that cost about as much as one more group."""
PADDED_PAIRS = 32768
"""Padded (query, key) pairs to compute that do."""
GATHERED_KEYS = 16384
"""A group with more gathers too much to stay in a cache."""


class Extent(NamedTuple):
    """How much one sequence brings: queries of this step, and keys to look at."""

    queries: int
    keys: int


def group_by_extent(extents: Sequence[Extent]) -> list[list[int]]:
    """Indices into `extents`, each in exactly one group."""
    groups: list[list[int]] = []
    queries = keys = useful_keys = useful_pairs = 0
    for index in sorted(range(len(extents)), key=lambda index: extents[index], reverse=True):
        extent = extents[index]
        size = len(groups[-1]) + 1 if groups else 1
        widest, longest = max(queries, extent.queries), max(keys, extent.keys)
        all_keys, all_pairs = useful_keys + extent.keys, useful_pairs + extent.queries * extent.keys
        joins = (
            groups
            and size * longest - all_keys <= PADDED_KEYS
            and size * longest * widest - all_pairs <= PADDED_PAIRS
            and size * longest <= GATHERED_KEYS
        )
        if joins:
            groups[-1].append(index)
            queries, keys, useful_keys, useful_pairs = widest, longest, all_keys, all_pairs
        else:
            groups.append([index])
            queries, keys = extent
            useful_keys, useful_pairs = keys, queries * keys
    return groups

"""Who writes what to whom where prefill and decode worker are divided differently: pure integers.

A rank's page is [its heads, its layers, ...] (`cluster.layout`). What one rank writes to another is the heads and
layers that both have: the same bytes of every page, one run of them for each head, or a single one where neither has
other layers. Every rank of the decode worker gets each of its heads, of each of its layers, from exactly one rank of
the prefill worker; where several have it, they take turns, so that none writes for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cluster.layout import KVLayout
from cluster.shards import Grid, holders, key_value_heads, layers_of


class Runs(NamedTuple):
    """Bytes of a page: `times` runs of `size`, the first from byte `first` on, each further one `stride` behind it."""

    first: int
    size: int
    times: int = 1
    stride: int = 0

    @property
    def end(self) -> int:
        """Behind the last byte."""
        return self.first + (self.times - 1) * self.stride + self.size

    def addresses(self, pages: Iterable[int]) -> list[int]:
        """Of each run, in pages at these addresses."""
        return [page + self.first + run * self.stride for page in pages for run in range(self.times)]


class PageSlice(NamedTuple):
    """Of each page, what goes from ours to the peer's: as many runs there as here, of the same size."""

    ours: Runs
    theirs: Runs


class Part(NamedTuple):
    """What rank `source` of the writer sends of each page to rank `target` of the receiver."""

    source: int
    target: int
    slice: PageSlice
    """Ours is the writer's."""


class _Block(NamedTuple):
    """Heads and layers of a page."""

    heads: range
    layers: range

    def runs(self, heads: range, layers: range, cell: int) -> Runs:
        """These heads and layers of it; a head's layer has `cell` bytes."""
        row = len(self.layers) * cell
        first = (heads.start - self.heads.start) * row + (layers.start - self.layers.start) * cell
        return Runs(first, len(layers) * cell, len(heads), row)


def parts_of(layout: KVLayout, sources: Grid, targets: Grid) -> list[Part]:
    """Of a handoff between a writer and a receiver that are divided so, sorted by target, then by source.

    Each byte of each target rank's page is in exactly one part.
    """
    return [part for target in range(targets.ranks) for part in _parts_to(target, layout, sources, targets)]


def _parts_to(target: int, layout: KVLayout, sources: Grid, targets: Grid) -> list[Part]:
    theirs = _block(layout, targets, target)
    taken = _taken_heads(layout.kv_heads, sources, targets, targets.shard_of(target))
    parts: list[Part] = []
    for stage in range(sources.stages):
        layers = _common(layers_of(layout.layers, sources.stages, stage), theirs.layers)
        for shard, heads in taken.items() if layers else ():
            source = sources.rank(stage, shard)
            ours = _block(layout, sources, source)
            cell = layout.head_bytes // layout.layers
            runs = PageSlice(ours.runs(heads, layers, cell), theirs.runs(heads, layers, cell))
            parts.append(Part(source, target, _joined(runs)))
    return parts


def _block(layout: KVLayout, grid: Grid, rank: int) -> _Block:
    return _Block(
        key_value_heads(layout.kv_heads, grid.shards, grid.shard_of(rank)),
        layers_of(layout.layers, grid.stages, grid.stage_of(rank)),
    )


def _taken_heads(kv_heads: int, sources: Grid, targets: Grid, shard: int) -> dict[int, range]:
    """Which of its heads the receiver's `shard` gets from which of the writer's shards."""
    taken: dict[int, range] = {}
    for head in key_value_heads(kv_heads, targets.shards, shard):
        writers = holders(kv_heads, sources.shards, head)
        source = writers[holders(kv_heads, targets.shards, head).index(shard) % len(writers)]
        begun = taken.get(source, range(head, head))
        taken[source] = range(begun.start, head + 1)
    return taken


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _joined(runs: PageSlice) -> PageSlice:
    """As a single run, where all of them are neighbours at both ends."""
    ours, theirs = runs
    if ours.times > 1 and not ours.size == ours.stride == theirs.stride:
        return runs
    size = ours.size * ours.times
    return PageSlice(Runs(ours.first, size), Runs(theirs.first, size))

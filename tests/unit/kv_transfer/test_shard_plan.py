"""Which bytes of a page go from which rank to which: all divisions of up to sixteen heads and seven layers."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from cluster.layout import KVLayout
from cluster.shards import Grid, even_range, holders, key_value_heads, layers_of, query_heads
from kv_transfer.shard_plan import PageSlice, Part, Runs, parts_of

RANKS = range(1, 9)
HEADS = range(1, 17)
GRIDS = [Grid(shards, stages) for shards, stages in product((1, 2, 3), (1, 2, 3))]
LAYERS = 3
CELL = 2 * 2 * 4 * 4
"""Bytes of a layer of a head."""


def layout(kv_heads: int, layers: int = LAYERS) -> KVLayout:
    return KVLayout("model", "float32", page_size=2, layers=layers, kv_heads=kv_heads, head_dim=4)


def cells_of(whole: KVLayout, grid: Grid, rank: int) -> list[tuple[int, int]]:
    """A rank's page, cell by cell: (head, layer)."""
    heads = key_value_heads(whole.kv_heads, grid.shards, grid.shard_of(rank))
    return [(head, layer) for head in heads for layer in layers_of(whole.layers, grid.stages, grid.stage_of(rank))]


def cells_in(runs: Runs) -> list[int]:
    """Which cells of a page these bytes are, in order."""
    assert runs.first % CELL == runs.size % CELL == runs.stride % CELL == 0 and runs.size > 0
    return [
        cell for begin in runs.addresses([0]) for cell in range(begin // CELL, (begin + runs.size) // CELL)
    ]  # fmt: skip


def expect_each_cell_once(whole: KVLayout, sources: Grid, targets: Grid) -> None:
    """Each cell of each receiving rank is written once, by a rank that has it."""
    received: dict[int, dict[int, tuple[int, int]]] = {target: {} for target in range(targets.ranks)}
    for source, target, (ours, theirs) in parts_of(whole, sources, targets):
        assert (ours.size, ours.times) == (theirs.size, theirs.times)
        sent = cells_of(whole, sources, source)
        for here, there in zip(cells_in(ours), cells_in(theirs), strict=True):
            assert there not in received[target], "written once"
            received[target][there] = sent[here]
    for target, found in received.items():
        assert [found[place] for place in sorted(found)] == cells_of(whole, targets, target)


@pytest.mark.parametrize("kv_heads", HEADS)
def test_each_byte_of_each_receiving_shard_is_written_once_by_one_that_has_it(kv_heads):
    for sources, targets in product(RANKS, RANKS):
        expect_each_cell_once(layout(kv_heads), Grid(sources), Grid(targets))


@pytest.mark.parametrize("layers", [3, 4, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4])
def test_each_byte_goes_once_between_any_stages_and_shards(kv_heads, layers):
    for sources, targets in product(GRIDS, GRIDS):
        expect_each_cell_once(layout(kv_heads, layers), sources, targets)


@pytest.mark.parametrize("kv_heads", HEADS)
def test_a_pair_of_ranks_has_one_part_and_equal_workers_write_whole_pages(kv_heads):
    for sources, targets in [*product(map(Grid, RANKS), map(Grid, RANKS)), *product(GRIDS, GRIDS)]:
        parts = parts_of(layout(kv_heads), sources, targets)
        pairs = Counter((part.source, part.target) for part in parts)
        assert set(pairs.values()) == {1}
        assert parts == sorted(parts, key=lambda part: (part.target, part.source))
        if sources == targets and sources.shards <= kv_heads:
            pages = [Runs(0, len(cells_of(layout(kv_heads), sources, rank)) * CELL) for rank in range(sources.ranks)]
            assert parts == [Part(rank, rank, PageSlice(page, page)) for rank, page in enumerate(pages)]
        if sources.stages == targets.stages:
            assert all(part.slice.ours.times == 1 for part in parts), "heads are neighbours"


@pytest.mark.parametrize(("kv_heads", "sources", "targets"), [(1, 4, 4), (2, 4, 8), (3, 6, 6)])
def test_writers_that_have_the_same_head_take_turns(kv_heads, sources, targets):
    writes = Counter(part.source for part in parts_of(layout(kv_heads), Grid(sources), Grid(targets)))
    assert set(writes) == set(range(sources)) and len(set(writes.values())) == 1


def test_three_heads_go_from_two_shards_to_three():
    size = LAYERS * CELL
    assert parts_of(layout(3), Grid(2), Grid(3)) == [
        Part(0, 0, PageSlice(Runs(0, size), Runs(0, size))),
        Part(0, 1, PageSlice(Runs(size, size), Runs(0, size))),
        Part(1, 2, PageSlice(Runs(0, size), Runs(0, size))),
    ]
    assert parts_of(layout(3), Grid(1), Grid(2)) == [
        Part(0, 0, PageSlice(Runs(0, 2 * size), Runs(0, 2 * size))),
        Part(0, 1, PageSlice(Runs(2 * size, size), Runs(0, size))),
    ]


def test_two_stages_write_their_layers_between_each_others():
    """Of three heads and three layers, each head's first two layers come from the first stage."""
    assert parts_of(layout(3), Grid(stages=2), Grid()) == [
        Part(0, 0, PageSlice(Runs(0, 2 * CELL, 3, 2 * CELL), Runs(0, 2 * CELL, 3, 3 * CELL))),
        Part(1, 0, PageSlice(Runs(0, CELL, 3, CELL), Runs(2 * CELL, CELL, 3, 3 * CELL))),
    ]


@pytest.mark.parametrize("kv_heads", HEADS)
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_each_query_head_is_computed_once_beside_the_keys_that_it_reads(kv_heads, group):
    for shards in range(1, min(8, kv_heads * group) + 1):
        own = [query_heads(kv_heads * group, kv_heads, shards, rank) for rank in range(shards)]
        assert [head for rank in own for head in rank] == list(range(kv_heads * group))
        for rank, queries in enumerate(own):
            keys = key_value_heads(kv_heads, shards, rank)
            assert len(queries) and len(queries) % len(keys) == 0, "each of its keys has as many of them"
            assert {query // group for query in queries} == set(keys)
        assert {rank for head in range(kv_heads) for rank in holders(kv_heads, shards, head)} == set(range(shards))


def test_shares_are_even_and_in_whole_units_where_these_fit():
    assert [even_range(1536, 3, rank, 32) for rank in range(3)] == [
        range(512), range(512, 1024), range(1024, 1536)
    ]  # fmt: skip
    assert [len(even_range(160, 3, rank, 32)) for rank in range(3)] == [64, 64, 32]
    assert [len(even_range(10, 4, rank, 32)) for rank in range(4)] == [4, 2, 2, 2]
    assert [len(even_range(11, 4, rank, 32)) for rank in range(4)] == [3, 3, 3, 2]


@pytest.mark.parametrize("layers", range(1, 34))
def test_each_layer_is_in_one_stage_and_early_stages_have_the_remainder(layers):
    for stages in range(1, 9):
        own = [layers_of(layers, stages, stage) for stage in range(stages)]
        assert [layer for stage in own for layer in stage] == list(range(layers))
        sizes = [len(stage) for stage in own]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_ranks_are_numbered_stage_by_stage():
    grid = Grid(shards=2, stages=3)
    assert [(grid.stage_of(rank), grid.shard_of(rank)) for rank in range(grid.ranks)] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)
    ]  # fmt: skip
    assert [grid.rank(grid.stage_of(rank), grid.shard_of(rank)) for rank in range(6)] == list(range(6))


@pytest.mark.parametrize("grid", GRIDS)
def test_workers_fit_together_however_they_are_divided(grid):
    one = KVLayout("model", "float32", 16, 4, 3, 8)
    other = KVLayout("model", "float32", 16, 4, 3, 8, shards=grid.shards, stages=grid.stages)
    one.require_compatible(other, ours="one", theirs="other")
    assert one.fingerprint == other.fingerprint
    assert sum(other.of_rank(rank).page_bytes for rank in range(grid.ranks)) == one.page_bytes == other.page_bytes
    assert [other.of_rank(rank).kv_heads for rank in range(grid.shards)] == {1: [3], 2: [2, 1], 3: [1, 1, 1]}[
        grid.shards
    ]

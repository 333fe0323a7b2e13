"""Which bytes of a page go from which rank to which: every division up to eight ranks, of up to sixteen heads."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from cluster.layout import KVLayout
from cluster.shards import even_range, holders, key_value_heads, query_heads
from kv_transfer.shard_plan import PageSlice, Part, parts_of

RANKS = range(1, 9)
HEADS = range(1, 17)


def layout(kv_heads: int) -> KVLayout:
    return KVLayout("model", "float32", page_size=2, layers=3, kv_heads=kv_heads, head_dim=4)


def page_of(rank_heads: range, head_bytes: int) -> list[tuple[int, int]]:
    """A rank's page, byte by byte: (head, byte of its part)."""
    return [(head, byte) for head in rank_heads for byte in range(0, head_bytes, 96)]


@pytest.mark.parametrize("kv_heads", HEADS)
def test_each_byte_of_each_receiving_rank_is_written_once_by_a_rank_that_has_it(kv_heads):
    size = layout(kv_heads).head_bytes
    for sources, targets in product(RANKS, RANKS):
        received = {target: {} for target in range(targets)}
        for source, target, (ours, theirs, length) in parts_of(layout(kv_heads), sources, targets):
            sent = page_of(key_value_heads(kv_heads, sources, source), size)
            assert ours % size == theirs % size == length % size == 0
            assert length > 0 and ours + length <= len(sent) * 96, "within the writer's page"
            for byte in range(0, length, 96):
                assert theirs + byte not in received[target], "written once"
                received[target][theirs + byte] = sent[(ours + byte) // 96]
        for target, found in received.items():
            page = page_of(key_value_heads(kv_heads, targets, target), size)
            assert [found.get(96 * place) for place in range(len(page))] == page


@pytest.mark.parametrize("kv_heads", HEADS)
def test_a_pair_of_ranks_has_one_part_and_equal_workers_write_whole_pages(kv_heads):
    for sources, targets in product(RANKS, RANKS):
        parts = parts_of(layout(kv_heads), sources, targets)
        pairs = Counter((part.source, part.target) for part in parts)
        assert set(pairs.values()) == {1}
        assert parts == sorted(parts, key=lambda part: (part.target, part.slice.theirs))
        if sources == targets <= kv_heads:
            whole = [len(key_value_heads(kv_heads, sources, rank)) for rank in range(sources)]
            size = layout(kv_heads).head_bytes
            assert parts == [Part(rank, rank, PageSlice(0, 0, heads * size)) for rank, heads in enumerate(whole)]


@pytest.mark.parametrize(("kv_heads", "sources", "targets"), [(1, 4, 4), (2, 4, 8), (3, 6, 6)])
def test_writers_that_have_the_same_head_take_turns(kv_heads, sources, targets):
    writes = Counter(part.source for part in parts_of(layout(kv_heads), sources, targets))
    assert set(writes) == set(range(sources)) and len(set(writes.values())) == 1


def test_three_heads_go_from_two_ranks_to_three():
    size = layout(3).head_bytes
    assert parts_of(layout(3), 2, 3) == [
        Part(0, 0, PageSlice(0, 0, size)),
        Part(0, 1, PageSlice(size, 0, size)),
        Part(1, 2, PageSlice(0, 0, size)),
    ]
    assert parts_of(layout(3), 1, 2) == [
        Part(0, 0, PageSlice(0, 0, 2 * size)),
        Part(0, 1, PageSlice(2 * size, 0, size)),
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


def test_workers_fit_together_whatever_their_shards():
    one, two = (KVLayout("model", "float32", 16, 3, 3, 8, shards=shards) for shards in (1, 2))
    one.require_compatible(two, ours="one", theirs="two")
    assert one.fingerprint == two.fingerprint
    assert [two.of_rank(rank).kv_heads for rank in range(2)] == [2, 1]
    assert sum(two.of_rank(rank).page_bytes for rank in range(2)) == one.page_bytes == two.page_bytes

"""Digests that a device computes of its own pages: any damage shows, and what is equal has equal ones."""

from __future__ import annotations

import pytest
import torch

from cluster.layout import KVLayout
from engine import page_digests
from engine.kv_cache import KVCache
from engine.page_digests import DevicePageDigests, device_digests
from kv_transfer.shard_plan import Runs

CPU = torch.device("cpu")
BITS = (1 << 64) - 1


def filled(dtype="float32", pages=6, **sizes):
    shape = {"page_size": 2, "layers": 3, "kv_heads": 2, "head_dim": 4} | sizes
    cache = KVCache(KVLayout("m", dtype, **shape), pages, CPU)
    generator = torch.Generator().manual_seed(1)
    raw = cache.pool.view(-1).view(torch.uint8)
    raw.copy_(torch.randint(256, raw.shape, generator=generator, dtype=torch.uint8))
    return cache, raw.view(pages, -1)


def splitmix64(number):
    """Number `number` of the sequence that begins at 0."""
    state = number * 0x9E3779B97F4A7C15 & BITS
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & BITS
    state = (state ^ state >> 27) * 0x94D049BB133111EB & BITS
    return state ^ state >> 31


def by_definition(page):
    words = [int.from_bytes(bytes(page[at : at + 8].tolist()), "little") for at in range(0, len(page), 8)]
    digest = 0
    for place, word in enumerate(words):
        mixed = word * (splitmix64(place + 1) | 1) & BITS
        mixed ^= mixed >> 32
        digest += mixed * (splitmix64(len(words) + place + 1) | 1)
    return digest & BITS


def test_they_are_what_the_definition_says():
    cache, raw = filled()
    assert DevicePageDigests(cache).of([4, 0, 4]) == [by_definition(raw[page]) for page in (4, 0, 4)]
    assert DevicePageDigests(cache).of([]) == []


def test_many_pages_are_computed_some_at_a_time(monkeypatch):
    cache, raw = filled()
    monkeypatch.setattr(page_digests, "BYTES_AT_ONCE", 2 * cache.page_bytes)
    assert DevicePageDigests(cache).of([5, 1, 2, 0, 3]) == [by_definition(raw[page]) for page in (5, 1, 2, 0, 3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn"])
def test_damage_shows_wherever_it_is(dtype):
    cache, raw = filled(dtype)
    digests = DevicePageDigests(cache)
    before = digests.of([3])
    for place in range(0, cache.page_bytes, 7):
        raw[3, place] ^= 0x80
        assert digests.of([3]) != before, place
        raw[3, place] ^= 0x80
    assert digests.of([3]) == before


def test_two_top_bits_and_two_words_that_changed_places_show():
    cache, raw = filled()
    digests = DevicePageDigests(cache)
    before = digests.of([0])
    raw[0, 7] ^= 0x80
    raw[0, 15] ^= 0x80
    assert digests.of([0]) != before
    raw[0, 7] ^= 0x80
    raw[0, 15] ^= 0x80
    raw[0, :16] = torch.cat([raw[0, 8:16], raw[0, :8]]).clone()
    assert digests.of([0]) != before


@pytest.mark.parametrize("head_dim", [4, 6])
def test_a_part_has_the_same_digest_wherever_it_lies_in_a_page(head_dim):
    """Heads of unequal shards lie elsewhere in the receiver's page than in the writer's."""
    (cache, raw), (other, others) = filled("float8_e4m3fn", page_size=1, head_dim=head_dim), filled("bfloat16")
    size = cache.layout.page_bytes // 6
    mine, theirs = Runs(size, size, 2, 2 * size), Runs(4, size, 2, size + 8)
    for run in range(2):
        source = raw[2, size + 2 * size * run :][:size]
        others[5, 4 + (size + 8) * run :][:size] = source
    assert DevicePageDigests(cache).of([2], mine) == DevicePageDigests(other).of([5], theirs)


def test_a_page_that_is_not_there_is_an_error():
    cache, _ = filled()
    with pytest.raises(ValueError, match="page 6 is not in the pool of 6 pages"):
        DevicePageDigests(cache).of([0, 6])


def test_the_host_reads_its_own_pages_itself():
    assert device_digests(filled()[0]) is None

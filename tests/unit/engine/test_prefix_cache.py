"""Pages that prompts share: found by their tokens, kept while used, evicted from the ends of chains."""

from __future__ import annotations

import random

import pytest

from engine.pages import OutOfPages, Owner, OwnerKind, PageLedger
from engine.prefix_cache import PrefixCache

PAGE = 4


def owner(key: str) -> Owner:
    return Owner(OwnerKind.SEQUENCE, key)


class Pool:
    def __init__(self, pages: int = 16, *, enabled: bool = True) -> None:
        self.ledger = PageLedger(pages)
        self.cache = PrefixCache(self.ledger, PAGE, enabled=enabled)

    def use(self, key: str, tokens: list[int]) -> list[int]:
        """What a sequence does: acquire, allocate the rest, compute, insert."""
        pages = self.acquire(key, tokens)
        pages += self.cache.allocate(owner(key), -(-len(tokens) // PAGE) - len(pages))
        self.cache.insert(key, owner(key), tokens, pages)
        self.check()
        return pages

    def acquire(self, key: str, tokens: list[int]) -> list[int]:
        return self.cache.acquire(key, self.cache.chain(tokens))

    def end(self, key: str) -> None:
        self.cache.release(key)
        self.ledger.release(owner(key))
        self.check()

    def check(self) -> None:
        self.cache.check()
        self.ledger.check()


@pytest.fixture
def pool() -> Pool:
    return Pool()


def test_a_prompt_that_begins_alike_gets_the_same_pages_and_no_others(pool):
    first = pool.use("a", list(range(12)))
    assert pool.use("b", [*range(8), 99, 98, 97, 96])[:2] == first[:2]
    assert pool.use("c", [99, *range(1, 12)])[0] not in first, (
        "the same tokens behind another beginning are not the same"
    )
    assert pool.ledger.used == 3 + 1 + 3


def test_only_full_pages_are_shared(pool):
    first = pool.use("a", list(range(7)))
    assert pool.use("b", list(range(7)))[0] == first[0]
    assert pool.use("c", list(range(7)))[1] != first[1]


def test_pages_outlive_their_sequence_and_are_free_for_whoever_needs_them(pool):
    first = pool.use("a", list(range(16)))
    pool.end("a")
    assert (pool.cache.evictable, pool.cache.available) == (4, 16)
    assert pool.acquire("b", list(range(16))) == first
    assert pool.cache.available == 12
    pool.cache.release("b")
    assert len(pool.cache.allocate(owner("c"), 16)) == 16
    assert pool.acquire("d", list(range(16))) == []
    pool.check()


def test_a_page_in_use_is_never_evicted(pool):
    pool.use("a", list(range(16)))
    with pytest.raises(OutOfPages):
        pool.cache.allocate(owner("b"), 13)
    assert pool.acquire("c", list(range(16))) != []


def test_the_least_recently_used_go_first_and_chains_from_their_ends(pool):
    pool.use("old", list(range(16)))
    pool.end("old")
    pool.use("new", list(range(100, 116)))
    pool.end("new")
    pool.cache.allocate(owner("x"), 10)
    assert len(pool.acquire("a", list(range(16)))) == 2
    assert len(pool.acquire("b", list(range(100, 116)))) == 4
    pool.check()


def test_a_chain_is_as_young_as_its_last_use(pool):
    pool.use("a", list(range(16)))
    pool.end("a")
    pool.use("b", list(range(100, 116)))
    pool.end("b")
    pool.acquire("again", list(range(16)))
    pool.cache.release("again")
    pool.cache.allocate(owner("x"), 12)
    assert pool.acquire("c", list(range(100, 116))) == []
    assert len(pool.acquire("d", list(range(16)))) == 4


def test_two_that_compute_the_same_at_once_share_afterwards_and_lose_no_page(pool):
    tokens = list(range(8))
    for key in "ab":
        assert pool.acquire(key, tokens) == []
    pages = {key: pool.cache.allocate(owner(key), 2) for key in "ab"}
    for key in "ab":
        pool.cache.insert(key, owner(key), tokens, pages[key])
    pool.check()
    pool.end("a")
    assert pool.cache.evictable == 0, "the second holds on to what the first has cached"
    pool.end("b")
    assert (pool.cache.evictable, pool.ledger.used) == (2, 2)


def test_insert_is_cumulative(pool):
    pages = pool.cache.allocate(owner("a"), 3)
    for computed in (3, 4, 6, 11, 12):
        pool.cache.insert("a", owner("a"), list(range(computed)), pages)
        pool.check()
    assert pool.cache.pages_of("a") == pages


def test_switched_off_it_keeps_nothing():
    pool = Pool(enabled=False)
    pool.use("a", list(range(16)))
    pool.end("a")
    assert (pool.ledger.used, pool.acquire("b", list(range(16)))) == (0, [])


def test_random_use_keeps_the_books(pool):
    chance = random.Random(3)
    live: dict[str, None] = {}
    for number in range(2000):
        if live and chance.random() < 0.5:
            key = chance.choice(list(live))
            del live[key]
            pool.end(key)
            continue
        tokens = [chance.randint(0, 1) for _ in range(chance.randint(1, 20))]
        try:
            pool.use(str(number), tokens)
        except OutOfPages:
            pool.end(str(number))
        else:
            live[str(number)] = None
    for key in live:
        pool.end(key)
    assert pool.ledger.used == pool.cache.evictable
    pool.cache.clear()
    assert pool.ledger.used == 0

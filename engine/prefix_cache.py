"""Full pages that hold known tokens, kept so that a prompt that begins alike is not computed, or sent, again. Pure.

A page's key is a hash of its tokens and of its parent's key: equal keys mean equal tokens from the beginning on. Each
cached page belongs to the ledger's Owner(CACHED, key). A holder (a request, named by its fence) refers to the chain of
pages that it uses; pages without references stay until somebody needs them, and go least recently used first.
Whoever refers to a page refers to all before it, so the least recently used page never has a used page behind it, and
chains are evicted from their ends.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from engine.pages import Owner, OwnerKind, PageLedger

ROOT = b""
"""Parent key of a first page."""


@dataclass
class _Entry:
    page: int
    references: int


class PrefixCache:
    """Between the ledger and whoever allocates. With `enabled` false it keeps nothing, and allocates all the same."""

    def __init__(self, ledger: PageLedger, page_size: int, *, enabled: bool = True) -> None:
        self._ledger = ledger
        self._page_size = page_size
        self._enabled = enabled
        self._entries: dict[bytes, _Entry] = {}
        self._evictable: OrderedDict[bytes, None] = OrderedDict()
        """Keys without references, least recently used first."""
        self._held: dict[Hashable, list[bytes]] = {}
        """Keys that a holder refers to, in order of the chain."""

    @property
    def evictable(self) -> int:
        """Cached pages that nobody uses: free for all who ask."""
        return len(self._evictable)

    @property
    def available(self) -> int:
        """Pages that `allocate` can give now."""
        return self._ledger.free + self.evictable

    def allocate(self, owner: Owner, count: int) -> list[int]:
        """`PageLedger.allocate`, evicting what is needed. Raises `OutOfPages`: all or nothing."""
        if count <= self.available:
            for _ in range(count - self._ledger.free):
                key, _ = self._evictable.popitem(last=False)
                del self._entries[key]
                self._ledger.release(_owner(key))
        return self._ledger.allocate(owner, count)

    def chain(self, tokens: Sequence[int]) -> list[bytes]:
        """Keys of the full pages of `tokens`, in order: what they are looked up by."""
        return list(self._keys(tokens, ROOT)) if self._enabled else []

    def present(self, chain: Sequence[bytes]) -> int:
        """How many pages `acquire` would find."""
        # Chains are evicted from their ends: what is cached of one is its beginning.
        return bisect_left(chain, True, key=lambda key: key not in self._entries)

    def acquire(self, holder: Hashable, chain: Sequence[bytes]) -> list[int]:
        """The pages of the longest cached beginning of `chain`; `holder` refers to them from now on.

        Once per holder, before any `insert`; `release` ends it.
        """
        if self._held.get(holder):
            raise ValueError(f"{holder} holds pages already")
        found = chain[: self.present(chain)]
        self._held[holder] = []
        for key in found:
            self._refer(holder, key)
        return [self._entries[key].page for key in found]

    def pages_of(self, holder: Hashable) -> list[int]:
        """The pages that `holder` refers to, in order."""
        return [self._entries[key].page for key in self._held.get(holder, ())]

    def insert(self, holder: Hashable, owner: Owner, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Caches the full pages of `tokens`, whose KV is in `pages`; those that `owner` has become the cache's.

        Cumulative: `tokens` and `pages` begin with what the holder has acquired or inserted before. A page whose tokens
        are cached already, from another sequence, stays its owner's.
        """
        if not self._enabled:
            return
        held = self._held.setdefault(holder, [])
        known = len(held)
        parent = held[-1] if held else ROOT
        for index, key in enumerate(self._keys(tokens[known * self._page_size :], parent), known):
            if key not in self._entries:
                self._ledger.give(owner, pages[index], _owner(key))
                self._entries[key] = _Entry(pages[index], 0)
            self._refer(holder, key)

    def release(self, holder: Hashable) -> None:
        """Ends the holder's references. Unknown holders are fine."""
        for key in reversed(self._held.pop(holder, [])):
            entry = self._entries[key]
            entry.references -= 1
            if entry.references == 0:
                self._evictable[key] = None

    def clear(self) -> None:
        """Evicts everything that nobody uses."""
        while self._evictable:
            key, _ = self._evictable.popitem(last=False)
            del self._entries[key]
            self._ledger.release(_owner(key))

    def check(self) -> None:
        """Raises `ValueError` unless references, entries and the ledger agree."""
        counted = dict.fromkeys(self._entries, 0)
        for keys in self._held.values():
            for key in keys:
                counted[key] += 1
        for key, entry in self._entries.items():
            unused = key in self._evictable
            if (entry.references, entry.references == 0) != (counted[key], unused):
                raise ValueError(f"page {entry.page}: {entry.references} references, {counted[key]} holders, {unused=}")
            if self._ledger.pages_of(_owner(key)) != [entry.page]:
                raise ValueError(
                    f"page {entry.page} is cached, but the ledger says {self._ledger.pages_of(_owner(key))}"
                )

    def _refer(self, holder: Hashable, key: bytes) -> None:
        self._entries[key].references += 1
        self._evictable.pop(key, None)
        self._held[holder].append(key)

    def _keys(self, tokens: Sequence[int], parent: bytes) -> Iterator[bytes]:
        """Keys of the full pages of `tokens`, which follow `parent`."""
        for start in range(0, len(tokens) - self._page_size + 1, self._page_size):
            parent = xxhash.xxh3_128_digest(parent + array("q", tokens[start : start + self._page_size]).tobytes())
            yield parent


def _owner(key: bytes) -> Owner:
    return Owner(OwnerKind.CACHED, key)

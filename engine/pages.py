"""Who owns which page of the KV pool. Pure bookkeeping: it holds page numbers, never memory.

Every page is either free or has exactly one owner; `check` proves it. Pages that wait for a remote writer's word are
owned like all others (`OwnerKind.QUARANTINE`), so that nobody can get them by accident.
"""

from __future__ import annotations

from collections.abc import Hashable
from enum import Enum
from typing import NamedTuple

from cluster.errors import BatonError, Overloaded


class OwnerKind(str, Enum):
    SEQUENCE = "sequence"
    """A sequence of this engine's scheduler, or one that has finished and not been released."""
    LEASE = "lease"
    """Granted to a remote writer that has not finished."""
    RESERVED = "reserved"
    """Kept for what a leased sequence will need once it decodes."""
    QUARANTINE = "quarantine"
    """Given up, but a remote write may still land."""
    CACHED = "cached"
    """Holds a prefix, see `engine.prefix_cache`; shared by the sequences that refer to it."""
    WARMUP = "warmup"


class Owner(NamedTuple):
    """The key is whatever names one owner of that kind; for requests a `cluster.messages.Fence`."""

    kind: OwnerKind
    key: Hashable

    def __str__(self) -> str:
        return f"{self.kind.value} {self.key}"


class OutOfPages(Overloaded):
    """Fewer pages are free than were asked for; nothing was allocated."""


class LedgerBroken(BatonError):
    """Our own bug: pages were lost, or have two owners."""


class PageLedger:
    """The pool's pages and their owners."""

    def __init__(self, pages: int) -> None:
        self.total = pages
        # The page given back last is taken first: its memory is the most likely to be in a cache.
        self._free = list(range(pages - 1, -1, -1))
        self._owned: dict[Owner, list[int]] = {}

    @property
    def free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - self.free

    def allocate(self, owner: Owner, count: int) -> list[int]:
        """Appends `count` free pages to the owner's and returns them. Raises `OutOfPages`: all or nothing."""
        if count > self.free:
            raise OutOfPages(f"{owner} needs {count} pages, {self.free} of {self.total} are free ({self._story()})")
        if count <= 0:
            return []
        taken = self._free[-count:][::-1]
        del self._free[-count:]
        self._owned.setdefault(owner, []).extend(taken)
        return taken

    def pages_of(self, owner: Owner) -> list[int]:
        """The owner's pages in the order in which it got them; a copy, empty for an unknown owner."""
        return list(self._owned.get(owner, ()))

    def move(self, owner: Owner, to: Owner) -> None:
        """All pages of `owner` become `to`'s, after those it has, in order. Without pages there is nothing to do."""
        if owner != to and (pages := self._owned.pop(owner, None)):
            self._owned.setdefault(to, []).extend(pages)

    def give(self, owner: Owner, page: int, to: Owner) -> None:
        """One page of `owner` becomes `to`'s. Raises `ValueError` if it is not `owner`'s."""
        self._owned.get(owner, []).remove(page)
        if not self._owned[owner]:
            del self._owned[owner]
        self._owned.setdefault(to, []).append(page)

    def release(self, owner: Owner) -> int:
        """Frees all pages of `owner` and returns how many; 0 for an unknown owner."""
        pages = self._owned.pop(owner, [])
        self._free.extend(reversed(pages))
        return len(pages)

    def counts(self) -> dict[str, int]:
        """Owned pages by kind of owner, zeros included; sums to `used`."""
        counts = dict.fromkeys((kind.value for kind in OwnerKind), 0)
        for owner, pages in self._owned.items():
            counts[owner.kind.value] += len(pages)
        return counts

    def check(self) -> None:
        """Raises `LedgerBroken`, with the story, unless every page is free or owned, and by one owner only."""
        holders: dict[int, list[str]] = {page: [] for page in range(self.total)}
        for page in self._free:
            holders.setdefault(page, []).append("free")
        for owner, pages in self._owned.items():
            for page in pages:
                holders.setdefault(page, []).append(str(owner))
        wrong = [
            f"page {page}: {' and '.join(names) or 'lost'}"
            for page, names in holders.items()
            if len(names) != 1 or not 0 <= page < self.total
        ]
        if wrong:
            raise LedgerBroken(f"{len(wrong)} of {self.total} pages are wrong: {'; '.join(wrong)} ({self._story()})")

    def _story(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.counts().items() if count)
        return f"owned: {kinds or 'none'}"

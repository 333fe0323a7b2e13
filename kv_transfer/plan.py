"""Which pages go out next: pure arithmetic over one handoff's tokens and pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import ProtocolError
from cluster.messages import Grant


@dataclass(frozen=True)
class Batch:
    """Pages to copy together: our sources[i] to the peer's targets[i]."""

    first: int
    """Index of targets[0] in the grant."""
    sources: tuple[int, ...]
    targets: tuple[int, ...]


class WritePlan:
    """The pages of one handoff of `tokens` tokens, in order: what is computed, granted and posted.

    A page goes out once, when it is full; the last one when all tokens are computed. Pages below the grant's
    `skip_tokens` never do: the receiver has them.
    """

    def __init__(self, tokens: int, page_size: int) -> None:
        if tokens < 1:
            raise ValueError("a handoff has at least one token")
        self.tokens = tokens
        self._page_size = page_size
        self._pages: tuple[int, ...] = ()
        self._computed_tokens = 0
        self._targets: tuple[int, ...] | None = None
        self._posted = 0
        self._skipped_pages = 0

    @property
    def granted_pages(self) -> int:
        """Pages to be written, skipped ones not counted; 0 before the grant."""
        return len(self._targets or ())

    @property
    def skipped_pages(self) -> int:
        """Pages that the receiver has already; 0 before the grant."""
        return self._skipped_pages

    @property
    def complete(self) -> bool:
        """Every granted page has been posted."""
        return self._targets is not None and self._posted == len(self._targets)

    @property
    def all_computed(self) -> bool:
        return self._computed_tokens == self.tokens

    def computed(self, pages: Sequence[int], tokens: int) -> None:
        """KV of the first `tokens` tokens is in `pages` (cumulative). Raises `ValueError` if that shrinks, exceeds the
        offer or contradicts what was said before."""
        known = self._pages[: self._full_pages(self._computed_tokens)]
        if not self._computed_tokens <= tokens <= self.tokens:
            raise ValueError(f"{tokens} tokens computed after {self._computed_tokens} of {self.tokens}")
        if len(pages) < -(-tokens // self._page_size) or tuple(pages[: len(known)]) != known:
            raise ValueError(f"{len(pages)} pages for {tokens} tokens, or other pages than before")
        self._pages = tuple(pages)
        self._computed_tokens = tokens

    def grant(self, grant: Grant) -> None:
        """Takes the receiver's pages. Raises `ProtocolError` if they don't fit the offer."""
        total = -(-self.tokens // self._page_size)
        skipped, rest = divmod(grant.skip_tokens, self._page_size)
        if rest or not 0 <= skipped <= total or len(grant.pages) != total - skipped:
            raise ProtocolError(
                f"{len(grant.pages)} pages granted and {grant.skip_tokens} tokens skipped, for {self.tokens} tokens "
                f"in pages of {self._page_size}"
            )
        if len(set(grant.pages)) != len(grant.pages):
            raise ProtocolError("a page was granted twice")
        self._targets = tuple(grant.pages)
        self._skipped_pages = skipped

    def matches(self, grant: Grant) -> bool:
        """Whether `grant` repeats the one we have."""
        return self._targets == tuple(grant.pages) and self._skipped_pages * self._page_size == grant.skip_tokens

    def next_batch(self) -> Batch | None:
        """What can be written now and was not yet; counts as posted from here on."""
        if self._targets is None:
            return None
        ready = self._full_pages(self._computed_tokens) - self._skipped_pages
        if ready <= self._posted:
            return None
        first, self._posted = self._posted, ready
        sources = self._pages[self._skipped_pages + first : self._skipped_pages + ready]
        return Batch(first, sources, self._targets[first:ready])

    def _full_pages(self, tokens: int) -> int:
        """Pages that no later token will change."""
        return -(-tokens // self._page_size) if tokens == self.tokens else tokens // self._page_size

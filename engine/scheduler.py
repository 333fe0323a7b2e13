"""Which tokens the next step computes: continuous batching with chunked prefill. Pure: no clock, no tensor.

Admission is first come, first served, by committed tokens: a sequence enters when the ledger can give it pages for all
tokens it may ever need, so a running sequence never runs out. A step computes one token for every sequence that
decodes, and up to `chunk_tokens` prompt tokens of those that still prefill, oldest first: a long prompt takes several
steps, short prompts share one, and decoding never waits for more than a chunk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from cluster.messages import Fence, FinishReason
from engine.pages import Owner, OwnerKind, PageLedger
from engine.prefix_cache import PrefixCache
from engine.sequence import Sequence


class Chunk(NamedTuple):
    """Positions [start, stop) of one sequence, computed in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        """Whether it reaches the sequence's end, so that the step yields the next token."""
        return self.stop == self.sequence.length

    @property
    def prefills(self) -> bool:
        return self.start < self.sequence.prefill_end


class StepPlan(NamedTuple):
    """One step's work: decodes first, then prefills, each in order of admission."""

    chunks: list[Chunk]
    started: list[Sequence]
    """Keys of those of which this is the first step."""

    @property
    def sampling(self) -> list[Sequence]:
        """The sequences that get a token, in the order of their chunks."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]


class Scheduler:
    """Holds each sequence from `submit` until it finishes or is cancelled. Allocates pages, never frees them."""

    def __init__(
        self, ledger: PageLedger, prefixes: PrefixCache, page_size: int, max_running: int, chunk_tokens: int
    ) -> None:
        self._ledger = ledger
        self._prefixes = prefixes
        self._page_size = page_size
        self._max_running = max_running
        self._chunk_tokens = chunk_tokens
        self._paged: OrderedDict[Fence, Sequence] = OrderedDict()
        self._waiting: OrderedDict[Fence, Sequence] = OrderedDict()
        self._running: dict[Fence, Sequence] = {}
        self._unstarted: set[Fence] = set()

    def submit(self, sequence: Sequence) -> None:
        """Queues it. Its first pages are those of the prefix cache that its key refers to, and then those that
        Owner(SEQUENCE, key) has; KV of `computed` tokens is in them.

        Raises `ValueError` for a key that is here already, or for what can never run: no token without KV, none left to
        sample, more KV than its pages hold, or more pages than the pool has.
        """
        if sequence.key in self._unstarted or sequence.key in self._running:
            raise ValueError(f"sequence {sequence.key} was submitted twice")
        sequence.pages = self._prefixes.pages_of(sequence.key) + self._ledger.pages_of(_owner(sequence))
        held = len(sequence.pages) * self._page_size
        runnable = sequence.pending >= 1 and sequence.length <= sequence.capacity and sequence.computed <= held
        if not runnable or self._pages_for(sequence) > self._ledger.total:
            raise ValueError(
                f"sequence {sequence.key} can't run: {sequence.length} tokens, {sequence.computed} with KV, pages for "
                f"{held}, at most {sequence.capacity} needed, pool of {self._ledger.total} pages"
            )
        # Who has all its pages must not queue behind one that waits for pages: its own may be what that one waits for.
        queue = self._waiting if self._missing(sequence) else self._paged
        queue[sequence.key] = sequence
        self._unstarted.add(sequence.key)
        self._keep_prefix(sequence)

    def cancel(self, key: Fence) -> bool:
        """Drops the sequence wherever it is; its pages stay its own. False if there is none."""
        self._unstarted.discard(key)
        if key in self._running:
            self._keep_prefix(self._running[key])
        return any(queue.pop(key, None) is not None for queue in (self._running, self._waiting, self._paged))

    def plan(self) -> StepPlan | None:
        """Admits what fits and says what to compute now; None if there is nothing."""
        self._admit(self._paged)
        self._admit(self._waiting)
        if not self._running:
            return None
        decodes: list[Chunk] = []
        prefills: list[Chunk] = []
        budget = self._chunk_tokens
        for sequence in self._running.values():
            if sequence.pending == 1:
                decodes.append(Chunk(sequence, sequence.computed, sequence.length))
            elif budget:
                count = min(sequence.pending, budget)
                prefills.append(Chunk(sequence, sequence.computed, sequence.computed + count))
                budget -= count
        chunks = decodes + prefills
        return StepPlan(chunks, [chunk.sequence for chunk in chunks if chunk.sequence.key in self._unstarted])

    def commit(self, plan: StepPlan, tokens: Iterable[int]) -> list[FinishReason | None]:
        """Takes the tokens of `plan.sampling`; says for each whether its sequence has finished, and so has left."""
        sampling = plan.sampling
        for chunk in plan.chunks:
            prefills = chunk.prefills
            chunk.sequence.computed = chunk.stop
            if prefills:
                self._keep_prefix(chunk.sequence)
        self._unstarted.difference_update(sequence.key for sequence in plan.started)
        return [self._append(sequence, token) for sequence, token in zip(sampling, tokens, strict=True)]

    @property
    def running(self) -> int:
        """Sequences that are admitted."""
        return len(self._running)

    @property
    def queued(self) -> int:
        """Sequences that wait for their first step."""
        return len(self._unstarted)

    @property
    def queued_tokens(self) -> int:
        """Tokens still to be prefilled, of queued sequences and of those that are being prefilled."""
        everyone = (*self._running.values(), *self._waiting.values(), *self._paged.values())
        return sum(max(0, sequence.prefill_end - sequence.computed) for sequence in everyone)

    def _admit(self, queue: OrderedDict[Fence, Sequence]) -> None:
        while queue and len(self._running) < self._max_running:
            sequence = next(iter(queue.values()))
            if not self._find_pages(sequence):
                return
            self._running[sequence.key] = queue.pop(sequence.key)

    def _find_pages(self, sequence: Sequence) -> bool:
        """Gives it all the pages that it may ever need, cached ones first; False, and nothing, if there are too few."""
        # The last token is computed in any case: its logits are wanted.
        reusable = 0 if sequence.pages else (sequence.length - 1) // self._page_size
        if self._missing(sequence) - reusable > self._prefixes.available:
            return False
        if reusable:
            sequence.pages = self._prefixes.acquire(sequence.key, sequence.tokens(0, sequence.length - 1))
        missing = self._missing(sequence)
        if missing > self._prefixes.available:
            self._prefixes.release(sequence.key)
            sequence.pages = []
            return False
        if reusable:
            sequence.computed = sequence.cached = len(sequence.pages) * self._page_size
        sequence.pages += self._prefixes.allocate(_owner(sequence), missing)
        return True

    def _keep_prefix(self, sequence: Sequence) -> None:
        """What it has computed may serve others from now on."""
        self._prefixes.insert(sequence.key, _owner(sequence), sequence.tokens(0, sequence.computed), sequence.pages)

    def _append(self, sequence: Sequence, token: int) -> FinishReason | None:
        sequence.output.append(token)
        reason = None
        if token in sequence.sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif len(sequence.output) >= sequence.sampling.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._keep_prefix(sequence)
            del self._running[sequence.key]
        return reason

    def _pages_for(self, sequence: Sequence) -> int:
        return -(-sequence.capacity // self._page_size)

    def _missing(self, sequence: Sequence) -> int:
        return max(0, self._pages_for(sequence) - len(sequence.pages))


def _owner(sequence: Sequence) -> Owner:
    return Owner(OwnerKind.SEQUENCE, sequence.key)

"""Which tokens the next step computes: continuous batching with chunked prefill. Pure: no clock, no tensor.

A sequence enters, in the policy's order, when the ledger can give it pages for its prompt and for as much output as
`Commitments` expects. A step computes one token for every sequence that decodes, and beside them as many prompt tokens
of those that still prefill as `Pacing` allows, in the policy's order: a long prompt takes several steps, short prompts
share one, and decoding never waits for more than a chunk.

A sequence that outgrows its pages gets one at a time. When there is none left, the youngest of those that do not have
all that they may ever need is retracted: it leaves, and goes on as another attempt at its request. So the oldest always
gets on; who has all its pages never leaves; and who comes back gets twice as many as before (`Commitments.capacity`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cluster.messages import Fence, FinishReason
from engine.commitment import Commitments
from engine.pacing import Pacing
from engine.pages import Owner, OwnerKind, PageLedger
from engine.policies import Policy
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
    """One step's work: decodes first, in order of admission, then prefills, in the policy's."""

    chunks: list[Chunk]
    started: list[Sequence]
    """Keys of those of which this is the first step."""

    @property
    def sampling(self) -> list[Sequence]:
        """The sequences that get a token, in the order of their chunks."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]

    def without(self, key: Fence) -> StepPlan:
        """The same step for all but this sequence."""
        return StepPlan(
            [chunk for chunk in self.chunks if chunk.sequence.key != key],
            [sequence for sequence in self.started if sequence.key != key],
        )


class Taken(NamedTuple):
    """A token that a sequence got: number `offset` of its output; `finished` if it is the last."""

    offset: int
    finished: FinishReason | None


class Lease(NamedTuple):
    """Pages for the KV of a sequence's tokens from `skip_tokens` on, in order; that of those before is here."""

    pages: list[int]
    skip_tokens: int


class Scheduler:
    """Holds each sequence from `submit` until it finishes, is retracted or is cancelled. Allocates pages, never frees
    them: whoever hears that a sequence has left releases them. `retract` before `plan`, until it gives None.

    A step is planned, `launched` and, with its tokens, `commit`ted. Another may be planned and launched in between: it
    has the tokens of this one where they are computed, and pages for them. Of a sequence that this one turns out to
    end, by a stop token, it computes one token too many, which `commit` drops.

    With `steps_at_once` above 1, so many are under way at the same time, and the tokens of none are known anywhere
    before its commit: until then a sequence that gets one is in no other step. Those that decode are divided among the
    steps, so that there is always one for each.
    """

    def __init__(
        self,
        ledger: PageLedger,
        prefixes: PrefixCache,
        page_size: int,
        max_running: int,
        policy: Policy,
        pacing: Pacing,
        commitments: Commitments,
        retract_every_steps: int = 0,
        steps_at_once: int = 1,
    ) -> None:
        """`retract_every_steps`: for tests, see `cluster.config.DecodeScheduling`."""
        self._steps_at_once = steps_at_once
        self._ledger = ledger
        self._prefixes = prefixes
        self._page_size = page_size
        self._max_running = max_running
        self._policy = policy
        self._pacing = pacing
        self._commitments = commitments
        self._retract_every_steps = retract_every_steps
        self._to_forced_retraction = retract_every_steps
        self._paged: dict[Fence, Sequence] = {}
        self._waiting: dict[Fence, Sequence] = {}
        self._running: dict[Fence, Sequence] = {}
        """In order of admission."""
        self._growing: dict[Fence, Sequence] = {}
        """Those that have pages, but not all that they may ever need; oldest first."""
        self._unstarted: set[Fence] = set()

    def submit(self, sequence: Sequence) -> None:
        """Queues it. Its first pages are those of the prefix cache that its key refers to, and then those that
        Owner(SEQUENCE, key) has; KV of `computed` tokens is in them.

        Raises `ValueError` for a key that is here already, or for what can never run: no token without KV, none left to
        sample, some pages but not for all its tokens, KV but no pages, or more pages than the pool has.
        """
        if sequence.key in self._unstarted or sequence.key in self._running:
            raise ValueError(f"sequence {sequence.key} was submitted twice")
        sequence.pages = self._prefixes.pages_of(sequence.key) + self._ledger.pages_of(_owner(sequence))
        held = len(sequence.pages) * self._page_size
        runnable = sequence.pending >= 1 and sequence.length <= sequence.capacity
        paged = sequence.length <= held if held else not sequence.computed
        if not runnable or not paged or self._pages_for(sequence.capacity) > self._ledger.total:
            raise ValueError(
                f"sequence {sequence.key} can't run: {sequence.length} tokens, {sequence.computed} with KV, pages for "
                f"{held}, at most {sequence.capacity} needed, pool of {self._ledger.total} pages"
            )
        # Who has pages must not queue behind one that waits for pages: its own may be what that one waits for.
        if sequence.pages:
            self._paged[sequence.key] = sequence
            self._note_growth(sequence)
        else:
            self._waiting[sequence.key] = sequence
        self._unstarted.add(sequence.key)
        self._keep_prefix(sequence)

    def cancel(self, key: Fence) -> bool:
        """Drops the sequence wherever it is; its pages stay its own. False if there is none."""
        queues = (self._running, self._waiting, self._paged)
        sequence = next((queue[key] for queue in queues if key in queue), None)
        if sequence is None:
            return False
        # For what it needed, this is an end like others: a client's stop strings come as cancels.
        self._leave(sequence, cut_off=False)
        return True

    def retract(self) -> Sequence | None:
        """Takes out one sequence whose pages the others need for their next tokens, the youngest first; None if all
        have what they need. Its pages stay its own: release them, and ask again."""
        if self._short_of_pages:
            victim = next(reversed(self._growing.values()))
        elif (forced := self._forced_victim()) is not None:
            victim = forced
            self._to_forced_retraction = self._retract_every_steps
        else:
            return None
        self._leave(victim, cut_off=True)
        return victim

    @property
    def must_retract(self) -> bool:
        """Whether `retract` would take somebody out."""
        return self._short_of_pages or self._forced_victim() is not None

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """Admits what fits and says what to compute now; None if there is nothing. `now` is of `Sequence.arrived`'s
        clock: it decides who has waited for long."""
        self._admit(self._paged, now)
        if not self._pacing.holds_back(self._waiting.values(), self._running.values(), now):
            self._admit(self._waiting, now)
        decodes: list[Chunk] = []
        prompts: list[Sequence] = []
        most = self._most_decodes()
        for sequence in self._running.values():
            pending = sequence.pending
            if not pending or (sequence.unread and sequence.at_limit):
                continue
            if pending > 1:
                prompts.append(sequence)
            elif len(decodes) < most and self._grow(sequence):
                decodes.append(Chunk(sequence, sequence.computed, sequence.length))
        chunks = decodes + self._prefills(prompts, len(decodes), now)
        if not chunks:
            return None
        return StepPlan(chunks, [chunk.sequence for chunk in chunks if chunk.sequence.key in self._unstarted])

    def overtake(self, plan: StepPlan, now: float) -> StepPlan | None:
        """While `plan` is being computed: those who wait, go before everybody in it by the policy, and are completed by
        one step of their own; None if there are none. Commit it before `plan`."""
        overtaken = min(self._policy.rank(chunk.sequence, now) for chunk in plan.chunks)
        budget = self._pacing.budget(decodes=0)
        chunks: list[Chunk] = []
        for sequence in self._ordered(self._waiting.values(), now):
            ahead = self._policy.rank(sequence, now) < overtaken and sequence.pending <= budget
            if not ahead or len(self._running) >= self._max_running or not self._find_pages(sequence):
                break
            self._enter(sequence, self._waiting)
            chunks.append(Chunk(sequence, sequence.computed, sequence.length))
            budget -= sequence.pending
        return StepPlan(chunks, [chunk.sequence for chunk in chunks]) if chunks else None

    def launched(self, plan: StepPlan) -> None:
        """The step is under way: from now on its chunks count as computed, and the tokens it samples as unread."""
        for chunk in plan.chunks:
            sequence, prefills, samples = chunk.sequence, chunk.prefills, chunk.samples
            sequence.computed = chunk.stop
            if samples and self._steps_at_once == 1:
                sequence.unread += 1
            if prefills:
                self._keep_prefix(sequence)
        self._unstarted.difference_update(sequence.key for sequence in plan.started)

    def commit(self, sequences: Iterable[Sequence], tokens: Iterable[int]) -> list[Taken | None]:
        """Takes the tokens of a step that was launched, for its `sampling` sequences; None for one that has left."""
        self._to_forced_retraction -= 1
        return [
            self._append(sequence, token) if self.has(sequence) else None
            for sequence, token in zip(sequences, tokens, strict=True)
        ]

    def has(self, sequence: Sequence) -> bool:
        """Whether it has entered, and not left."""
        return sequence.key in self._running

    # --- for whoever queues sequences before they are submitted ------------------------------------------------------

    def first(self, sequences: Iterable[Sequence], now: float) -> Sequence:
        """Whose turn it is, by this pool's policy; there must be one."""
        return min(sequences, key=lambda sequence: self._policy.rank(sequence, now))

    def lease(self, sequence: Sequence) -> Lease | None:
        """Pages for the KV of all its tokens, to be written from outside: it refers to cached ones, the rest is owned
        by Owner(LEASE, key), and what its output will need by Owner(RESERVED, key). None, and nothing, if there are
        too few."""
        key, total = sequence.key, self._pages_for(sequence.length)
        reserved = max(0, self._pages_to_enter(sequence) - total)
        present = self._acquire(sequence, total, total + reserved)
        if present is None:
            return None
        pages = self._prefixes.allocate(Owner(OwnerKind.LEASE, key), total - len(present))
        self._prefixes.allocate(Owner(OwnerKind.RESERVED, key), reserved)
        return Lease(pages, len(present) * self._page_size)

    # --- counts ------------------------------------------------------------------------------------------------------

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
        """Tokens still to be computed before their sequences decode: of those that are being prefilled, and of queued
        ones as far as the prefix cache does not have them now."""
        everyone = (*self._running.values(), *self._waiting.values(), *self._paged.values())
        return sum(max(0, sequence.prefill_end - self._computed_or_cached(sequence)) for sequence in everyone)

    def _computed_or_cached(self, sequence: Sequence) -> int:
        if sequence.pages:
            return sequence.computed
        present = self._prefixes.present(sequence.chain_by(self._prefixes.chain))
        return max(sequence.computed, min(present, (sequence.length - 1) // self._page_size) * self._page_size)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _admit(self, queue: dict[Fence, Sequence], now: float) -> None:
        """In the policy's order; the first that must wait holds up the rest, so that large ones don't starve."""
        if not queue or len(self._running) >= self._max_running:
            return
        for sequence in self._ordered(queue.values(), now):
            if len(self._running) >= self._max_running or not self._find_pages(sequence):
                return
            self._enter(sequence, queue)

    def _enter(self, sequence: Sequence, queue: dict[Fence, Sequence]) -> None:
        self._running[sequence.key] = queue.pop(sequence.key)
        self._note_growth(sequence)

    def _ordered(self, sequences: Iterable[Sequence], now: float) -> list[Sequence]:
        return sorted(sequences, key=lambda sequence: self._policy.rank(sequence, now))

    def _find_pages(self, sequence: Sequence) -> bool:
        """Sees to the pages that it enters with, cached ones first; False, and nothing, if there are too few."""
        if sequence.pages:
            return True
        wanted = self._pages_to_enter(sequence)
        # The last token is computed in any case: its logits are wanted.
        pages = self._acquire(sequence, (sequence.length - 1) // self._page_size, wanted)
        if pages is None:
            return False
        sequence.computed = sequence.cached = len(pages) * self._page_size
        sequence.pages = pages + self._prefixes.allocate(_owner(sequence), wanted - len(pages))
        return True

    def _acquire(self, sequence: Sequence, most: int, wanted: int) -> list[int] | None:
        """Refers to the cached ones of its first `most` pages, if there are enough others to make it `wanted`; if not,
        None, and nothing."""
        chain = sequence.chain_by(self._prefixes.chain)[:most]
        if wanted - self._prefixes.present(chain) > self._free_to_enter():
            return None
        pages = self._prefixes.acquire(sequence.key, chain)
        # Cached pages that nobody used counted as free until now.
        if wanted - len(pages) > self._free_to_enter():
            self._prefixes.release(sequence.key)
            return None
        return pages

    def _pages_to_enter(self, sequence: Sequence) -> int:
        """Pages that it gets when it enters, cached ones included."""
        return self._pages_for(self._commitments.capacity(sequence))

    def _free_to_enter(self) -> int:
        """Pages for those who enter: one stays for each sequence that may outgrow its own."""
        return self._prefixes.available - len(self._growing)

    def _most_decodes(self) -> int:
        """Of a step, so that there are some for each of those that are under way at the same time."""
        if self._steps_at_once == 1:
            return len(self._running)
        decoding = sum(sequence.computed >= sequence.prefill_end - 1 for sequence in self._running.values())
        return -(-decoding // self._steps_at_once)

    def _prefills(self, prompts: list[Sequence], decodes: int, now: float) -> list[Chunk]:
        ordered = self._ordered(prompts, now) if len(prompts) > 1 else prompts
        counts = self._pacing.share((sequence.pending for sequence in ordered), decodes)
        # `counts` ends where the step is full.
        return [
            Chunk(sequence, sequence.computed, sequence.computed + count)
            for sequence, count in zip(ordered, counts, strict=False)
        ]

    def _grow(self, sequence: Sequence) -> bool:
        """Sees to the page of its next token. False if there is none: nobody has asked whom to `retract`."""
        missing = self._lacking(sequence)
        if missing > self._prefixes.available:
            return False
        if missing:
            sequence.pages += self._prefixes.allocate(_owner(sequence), missing)
            self._note_growth(sequence)
        return True

    def _note_growth(self, sequence: Sequence) -> None:
        if len(sequence.pages) < self._pages_for(sequence.capacity):
            self._growing[sequence.key] = sequence
        else:
            self._growing.pop(sequence.key, None)

    def _forced_victim(self) -> Sequence | None:
        """The youngest that decodes: each of its attempts has given a token by then, so it gets through."""
        if not self._retract_every_steps or self._to_forced_retraction > 0:
            return None
        return next((one for one in reversed(self._running.values()) if one.computed >= one.prefill_end), None)

    def _keep_prefix(self, sequence: Sequence) -> None:
        """What it has computed may serve others from now on."""
        self._prefixes.insert(sequence.key, _owner(sequence), sequence.tokens(0, sequence.computed), sequence.pages)

    def _append(self, sequence: Sequence, token: int) -> Taken:
        offset = len(sequence.output)
        sequence.output.append(token)
        sequence.unread = max(0, sequence.unread - 1)
        reason = None
        if token in sequence.sampling.stop_token_ids:
            reason = FinishReason.STOP
        elif len(sequence.output) >= sequence.sampling.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self._leave(sequence, cut_off=reason is FinishReason.LENGTH)
        return Taken(offset, reason)

    def _leave(self, sequence: Sequence, *, cut_off: bool) -> None:
        key = sequence.key
        if key in self._running:
            self._keep_prefix(sequence)
        for queue in (self._running, self._waiting, self._paged, self._growing):
            queue.pop(key, None)
        self._unstarted.discard(key)
        self._commitments.ended(len(sequence.output), cut_off=cut_off)

    @property
    def _short_of_pages(self) -> bool:
        wanted = sum(self._lacking(sequence) for key, sequence in self._growing.items() if key in self._running)
        return wanted > self._prefixes.available

    def _lacking(self, sequence: Sequence) -> int:
        """Pages that it needs for the tokens it has, and does not have."""
        held = len(sequence.pages) * self._page_size
        if sequence.length <= held:
            return 0
        return self._pages_for(max(0, min(sequence.length, sequence.capacity) - held))

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_size)


def _owner(sequence: Sequence) -> Owner:
    return Owner(OwnerKind.SEQUENCE, sequence.key)

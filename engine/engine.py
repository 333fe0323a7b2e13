"""One worker's engine: model, KV pool, attention, scheduler and sampler, driven step by step.

Single-threaded: the step loop that made the engine is the only caller. It may see what the next step starts before it
is computed: `plan`, then `execute`; `step` is both.

    submit -> plan -> execute -> ... -> finished, or retracted (it leaves the scheduler) -> release (its pages are free)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from cluster.config import Kernels
from cluster.errors import InvalidRequest, PromptTooLong
from cluster.messages import Fence, FinishReason, Logprobs, Sampling, Speed
from cluster.ranks import ALONE, Rank
from engine.batch import build_step
from engine.commitment import Commitments
from engine.engine_config import EngineConfig
from engine.followers import LeadingDecoder
from engine.loaded_model import load_model
from engine.pacing import Pacing
from engine.pages import Owner, OwnerKind, PageLedger
from engine.policies import make_policy
from engine.pool_size import TRIAL_PAGES
from engine.prefix_cache import PrefixCache
from engine.sampler import choose
from engine.scheduler import Chunk, Lease, Scheduler, StepPlan
from engine.sequence import Sequence
from engine.shapes import ROWS, series

__all__ = ["TRIAL_PAGES", "Engine", "EngineConfig", "Progress", "Sampled", "StepPlan", "StepResult"]

TIMED_STEPS = 3
WARM_UP = Fence("warm-up", 0, 0, 0)
"""Key of the sequences that no request asked for."""


class Progress(NamedTuple):
    """A sequence that prefilled: KV of its first `computed` of `total` tokens is in its pages."""

    key: Fence
    computed: int
    total: int


class Sampled(NamedTuple):
    """Token number `offset` of a sequence's output. A stop token is given like any other."""

    key: Fence
    offset: int
    token: int
    logprobs: Logprobs | None
    finished: FinishReason | None


class StepResult(NamedTuple):
    started: list[Fence]
    """Sequences of which it was the first step."""
    progress: list[Progress]
    sampled: list[Sampled]
    batch_size: int
    """Sequences in the step."""
    prefill_tokens: int


class Engine:
    """See the module's docstring. Raises `ModelError` or `ConfigError` when it can't be made.

    With a model on several ranks, this is rank 0's; the others have an `engine.followers.Follower` each.
    """

    def __init__(self, config: EngineConfig, on_layer: Callable[[], None] = lambda: None, rank: Rank = ALONE) -> None:
        """`on_layer` is called after each layer of a step: a worker tells by it that it gets on."""
        model = load_model(config, rank)
        self.model = model.card
        self.layout = model.layout
        self.memory = model.memory
        self.ledger = PageLedger(model.cache.pages - TRIAL_PAGES)
        self.steps = 0
        """Steps since the start: grows while the engine makes progress."""
        self._config = config
        self._on_layer = on_layer
        self._cache = model.cache
        self._decoder = LeadingDecoder(model.decoder, rank.steps) if rank.steps else model.decoder
        self.prefixes = PrefixCache(self.ledger, config.page_size, enabled=config.prefix_cache)
        self._pacing = Pacing(
            config.chunk_tokens, config.conservativeness, config.prefill_delay_seconds, fill=config.fill_steps
        )
        self._scheduler = Scheduler(
            self.ledger,
            self.prefixes,
            config.page_size,
            config.max_running,
            make_policy(config.policy, config.ageing_seconds, self.prefixes),
            self._pacing,
            Commitments(config.commit_quantile),
            config.retract_every_steps,
        )

    @property
    def kernels(self) -> Kernels:
        """Who computes on this device: native kernels, or torch's operators."""
        return self._decoder.kernels

    @property
    def pool_address(self) -> int:
        """Of the KV pool's first byte."""
        return self._cache.address

    @property
    def pool_device(self) -> str:
        """`cpu`, or `cuda:N`."""
        return self._cache.device

    @property
    def pool_bytes(self) -> int:
        """Of the ledger's pages and, behind them, `TRIAL_PAGES`."""
        return self._cache.nbytes

    @property
    def page_bytes(self) -> int:
        return self._cache.page_bytes

    @property
    def pages_used(self) -> int:
        """Pages that somebody needs; what is only cached is free for all who ask."""
        return self.ledger.used - self.prefixes.evictable

    def owners(self) -> dict[str, int]:
        """Pages in use by kind of owner; sums to `pages_used`."""
        counts = self.ledger.counts()
        counts[OwnerKind.CACHED.value] -= self.prefixes.evictable
        return counts

    @property
    def queued(self) -> int:
        """Sequences that wait for their first step."""
        return self._scheduler.queued

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        return self._scheduler.queued_tokens

    @property
    def running(self) -> int:
        """Sequences in the step loop."""
        return self._scheduler.running

    def submit(self, sequence: Sequence) -> None:
        """Queues it, see `Scheduler.submit`. Raises what `require_computable` raises."""
        self.require_computable(sequence)
        self._scheduler.submit(sequence)

    def require_computable(self, sequence: Sequence) -> None:
        """Raises `PromptTooLong` or `InvalidRequest` for what this model and pool can't compute."""
        tokens = sequence.tokens(0, sequence.length)
        if not tokens:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if not 0 <= min(tokens) <= max(tokens) < self.model.vocab_size:
            raise InvalidRequest(f"token ids must be in [0, {self.model.vocab_size})", param="prompt")
        pool_tokens = self.ledger.total * self.layout.page_size
        limit = min(self.model.context_length, pool_tokens)
        if sequence.capacity > limit:
            raise PromptTooLong(
                f"{len(sequence.prompt)} prompt tokens and up to {sequence.sampling.max_tokens} new ones don't fit: "
                f"the context is {self.model.context_length} tokens, the KV pool {pool_tokens}",
                param="prompt",
            )

    def first(self, sequences: Iterable[Sequence], now: float) -> Sequence:
        """Whose turn it is, of some that are not submitted yet."""
        return self._scheduler.first(sequences, now)

    def lease(self, sequence: Sequence) -> Lease | None:
        """Pages for a sequence whose KV comes from elsewhere, see `Scheduler.lease`."""
        return self._scheduler.lease(sequence)

    def retract(self) -> Fence | None:
        """Takes a sequence out of the step loop whose pages others need, or says that they have enough: None. Call it
        until then before each `plan`; its pages stay its own until `release`."""
        victim = self._scheduler.retract()
        return None if victim is None else victim.key

    def cancel(self, key: Fence) -> bool:
        """Takes the sequence out of the step loop at once; its pages stay its own until `release`."""
        return self._scheduler.cancel(key)

    def release(self, key: Fence) -> None:
        """Gives back the pages of a sequence that has finished or was cancelled; full ones stay in the prefix cache."""
        self.prefixes.release(key)
        self.ledger.release(Owner(OwnerKind.SEQUENCE, key))

    def step(self, now: float = 0.0) -> StepResult | None:
        """One step; None if there is nothing to do."""
        plan = self.plan(now)
        return None if plan is None else self.execute(plan)

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """What the next step computes; None if there is nothing to do. Admitted sequences have their pages now. `now`
        is of `Sequence.arrived`'s clock.

        Between this and `execute` nothing may be submitted, cancelled or released.
        """
        return self._scheduler.plan(now)

    def overtake(self, plan: StepPlan, now: float) -> StepPlan | None:
        """Between two layers of `plan`: a step that goes before it, see `Scheduler.overtake`. `execute` it at once."""
        return self._scheduler.overtake(plan, now)

    def execute(self, plan: StepPlan, between_layers: Callable[[], None] = lambda: None) -> StepResult:
        """Computes the step, and samples. `between_layers` is called some dozen times meanwhile; it must be quick. It
        may submit, and execute what `overtake` gives; else it keeps its hands off this engine."""
        sequences = plan.sampling

        def after_layer() -> None:
            self._on_layer()
            between_layers()

        with torch.inference_mode():
            choices = choose(self._decoder.forward(build_step(plan.chunks), after_layer), sequences)
        prefills = [chunk for chunk in plan.chunks if chunk.prefills]
        offsets = [len(sequence.output) for sequence in sequences]
        finished = self._scheduler.commit(plan, [choice.token for choice in choices])
        self.steps += 1
        return StepResult(
            started=[sequence.key for sequence in plan.started],
            progress=[Progress(chunk.sequence.key, chunk.stop, chunk.sequence.prefill_end) for chunk in prefills],
            sampled=[
                Sampled(sequence.key, offset, choice.token, choice.logprobs, reason)
                for sequence, offset, choice, reason in zip(sequences, offsets, choices, finished, strict=True)
            ],
            batch_size=len(plan.chunks),
            prefill_tokens=sum(chunk.stop - chunk.start for chunk in prefills),
        )

    def warm_up(self) -> Speed:
        """Computes steps of all sizes, so that the first request finds kernels, memory and threads ready; and measures
        them, when they are."""
        owner = Owner(OwnerKind.WARMUP, WARM_UP)
        config, context = self._config, min(self.model.context_length, self.ledger.total * self.layout.page_size)
        tokens = min(config.chunk_tokens, context)
        pages = self.ledger.allocate(owner, self.layout.pages_for(tokens))
        with torch.inference_mode():
            self._decoder.warm_up(pages[0], config.chunk_tokens + config.max_running, config.max_running, context)
            for length in dict.fromkeys((tokens, max(1, tokens // 2), 1)):
                self._warm_up_step(pages, [length])
            for batch in series(min(config.max_running, len(pages)), ROWS):
                self._warm_up_step(pages, [1] * min(batch, len(pages)))
            chunk_seconds, step_seconds = (self._time_step(pages, length) for length in (tokens, 1))
        self.ledger.release(owner)
        token_seconds = max(0.0, chunk_seconds - step_seconds) / max(1, tokens - 1)
        return Speed(step_seconds, token_seconds, self._pacing.budget(decodes=1))

    def _time_step(self, pages: list[int], length: int) -> float:
        """Seconds of the fastest of some: the others were disturbed."""
        seconds = []
        for _ in range(TIMED_STEPS):
            begun = time.perf_counter()
            self._warm_up_step(pages, [length])
            seconds.append(time.perf_counter() - begun)
        return min(seconds)

    def _warm_up_step(self, pages: list[int], lengths: list[int]) -> None:
        """One step of prompts of these lengths, each from a page of its own on."""
        sampling = Sampling(max_tokens=1, seed=0, top_p=0.9)
        chunks = [Chunk(Sequence(WARM_UP, [0] * length, [], sampling), 0, length) for length in lengths]
        for first, chunk in enumerate(chunks):
            chunk.sequence.pages = pages[first:]
        choose(self._decoder.forward(build_step(chunks)), [chunk.sequence for chunk in chunks])

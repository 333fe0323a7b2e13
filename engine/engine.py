"""One worker's engine: model, KV pool, attention, scheduler and sampler, driven step by step.

Single-threaded: the step loop that made the engine is the only caller. It may see what the next step starts before it
is computed: `plan`, then `compute`; `step` is both.

    submit -> plan -> compute -> ... -> finished, or retracted (it leaves the scheduler) -> release (its pages are free)

Ahead (`EngineConfig.ahead`), `compute` launches a step and gives the result of the one before it: while the device is
at work on a step, the host reads the tokens of the last one and plans the next. What is known of a step under way is
enough for that: each of its sequences gets one token, which the next step finds where it was sampled. Only a stop token
comes as a surprise; its sequence is in the next step already, whose token for it is dropped. The pages of a sequence in
a step under way are not free before that step has been read, whoever releases them: it still writes there. Nobody is
retracted while a step is under way, since its end may be enough.

With the layers divided among stages, as many steps are under way as there are stages, one in each: while rank 0
computes its layers of a step, the next stage does so of the one before, be they chunks of the same prompt or others.
Here nobody has a step's tokens before its end, so a sequence that gets one is in no other step until then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.config import Kernels, Switch
from cluster.errors import ConfigError, InvalidRequest, PromptTooLong
from cluster.logging import get_logger
from cluster.messages import Fence, FinishReason, Logprobs, Sampling, Speed
from cluster.ranks import ALONE, Rank
from engine import batch
from engine.batch import build_step
from engine.commitment import Commitments
from engine.engine_config import EngineConfig
from engine.followers import LeadingDecoder
from engine.loaded_model import load_model
from engine.operators.nucleus import make_nucleus
from engine.pacing import Pacing
from engine.page_digests import DevicePageDigests, device_digests
from engine.pages import Owner, OwnerKind, PageLedger
from engine.policies import make_policy
from engine.pool_size import TRIAL_PAGES
from engine.prefix_cache import PrefixCache
from engine.sampler import Choice, Drawn, choose, draw
from engine.scheduler import Chunk, Lease, Scheduler, StepPlan
from engine.sequence import Sequence
from engine.shapes import ROWS, series

__all__ = ["TRIAL_PAGES", "Engine", "EngineConfig", "Progress", "Sampled", "StepPlan", "StepResult"]

log = get_logger(__name__)

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
    refused: tuple[Fence, ...] = ()
    """Sequences that the device had no memory for: they have left the scheduler."""


class _Awaited(NamedTuple):
    """Tokens that will be drawn from the logits of the last stage, when these are here."""

    logits: Callable[[], Tensor]
    sampling: list[Sequence]

    def read(self) -> list[Choice]:
        with torch.inference_mode():
            return choose(self.logits(), self.sampling)


class _Launched(NamedTuple):
    """A step that the device has been asked for."""

    plan: StepPlan
    sampling: list[Sequence]
    drawn: Drawn | _Awaited
    refused: tuple[Fence, ...] = ()
    """See `StepResult`."""

    @property
    def sampled(self) -> batch.Sampled | None:
        """Where the next step finds its tokens; None: nowhere."""
        if isinstance(self.drawn, _Awaited):
            return None
        return batch.Sampled([sequence.key for sequence in self.sampling], self.drawn.tokens)

    def has(self, key: Fence) -> bool:
        return any(chunk.sequence.key == key for chunk in self.plan.chunks)


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
        self._ahead = _is_ahead(config.ahead, model.cache.device, rank)
        self._under_way: deque[_Launched] = deque()
        """In their order."""
        self._leaving: list[Fence] = []
        """Released, and still in a step under way."""
        self._nucleus = make_nucleus(config.attention, model.cache, model.card.vocab_size)
        self._decoder = LeadingDecoder(model.decoder, rank.steps, model.line) if rank.steps else model.decoder
        stages = config.grid.stages
        self._pipeline = self._decoder if isinstance(self._decoder, LeadingDecoder) and stages > 1 else None
        self._most_unread = stages - 1 or int(self._ahead)
        """Steps that are still under way when `compute` returns."""
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
            stages,
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

    def page_digests(self) -> DevicePageDigests | None:
        """Of the pool's pages, where the host can't read them."""
        return device_digests(self._cache)

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
        victim = None if self._under_way else self._scheduler.retract()
        return None if victim is None else victim.key

    def cancel(self, key: Fence) -> bool:
        """Takes the sequence out of the step loop at once; its pages stay its own until `release`."""
        return self._scheduler.cancel(key)

    def release(self, key: Fence) -> None:
        """Gives back the pages of a sequence that has finished or was cancelled; full ones stay in the prefix cache."""
        if any(launched.has(key) for launched in self._under_way):
            self._leaving.append(key)
        else:
            self._give_back(key)

    def step(self, now: float = 0.0) -> StepResult | None:
        """The next result; None if there is nothing to do."""
        while True:
            plan = self.plan(now)
            result = self.compute(plan)
            if result is not None or plan is None:
                return result

    def plan(self, now: float = 0.0) -> StepPlan | None:
        """What the next step computes; None if there is nothing to do, or nothing before the step under way has been
        read. Admitted sequences have their pages now. `now` is of `Sequence.arrived`'s clock.

        Between this and `compute` nothing may be submitted, cancelled or released.
        """
        if self._under_way and self._scheduler.must_retract:
            return None
        return self._scheduler.plan(now)

    def compute(self, plan: StepPlan | None, between_layers: Callable[[], None] = lambda: None) -> StepResult | None:
        """What came of `plan`; ahead, of the step before it; with stages, of the first of those under way, if there
        are as many as stages, or if there is nothing else to do. None if there was none. See `execute`."""
        if not self._most_unread:
            return None if plan is None else self.execute(plan, between_layers)
        if plan is not None:
            self._under_way.append(self._launch(plan, between_layers))
        if not self._under_way or (plan is not None and len(self._under_way) <= self._most_unread):
            return None
        return self._read(self._under_way.popleft())

    @property
    def under_way(self) -> int:
        """Steps that are launched and not read: what they compute is not there yet."""
        return len(self._under_way)

    def overtake(self, plan: StepPlan, now: float) -> StepPlan | None:
        """Between two layers of `plan`: a step that goes before it, see `Scheduler.overtake`. `execute` it at once.
        Nothing overtakes a step on its way through stages: they compute in one order."""
        return None if self._pipeline else self._scheduler.overtake(plan, now)

    def execute(self, plan: StepPlan, between_layers: Callable[[], None] = lambda: None) -> StepResult:
        """Computes the step, and samples. `between_layers` is called some dozen times meanwhile (once, where a GPU
        replays it); it must be quick. It may submit, and execute what `overtake` gives; else it keeps its hands off
        this engine. Neither ahead nor with stages."""
        return self._read(self._launch(plan, between_layers))

    def _launch(self, plan: StepPlan, between_layers: Callable[[], None]) -> _Launched:
        """Without those, the newest first, that the device has no memory for."""
        refused: tuple[Fence, ...] = ()
        while (launched := self._try_to_launch(plan, between_layers)) is None:
            newest = max((chunk.sequence for chunk in plan.chunks), key=lambda sequence: sequence.arrived)
            log.warning("no memory for a step: its newest request is refused", request=str(newest.key))
            self._scheduler.cancel(newest.key)
            refused += (newest.key,)
            plan = plan.without(newest.key)
        return launched._replace(refused=refused)

    def _try_to_launch(self, plan: StepPlan, between_layers: Callable[[], None]) -> _Launched | None:
        """None if the device has no memory for it: nothing has changed then. Where other ranks have begun with the step
        there is no way back, and what torch says ends this process."""
        if not plan.chunks:
            return _Launched(plan, [], _Awaited(lambda: torch.empty(0, self.model.vocab_size), []))
        try:
            return self._launch_all(plan, between_layers)
        except torch.OutOfMemoryError:
            if isinstance(self._decoder, LeadingDecoder):
                raise
            return None

    def _launch_all(self, plan: StepPlan, between_layers: Callable[[], None]) -> _Launched:
        sampling = plan.sampling
        before = self._under_way[-1].sampled if self._under_way else None

        def after_layer() -> None:
            self._on_layer()
            between_layers()

        with torch.inference_mode():
            step = build_step(plan.chunks, before)
            drawn: Drawn | _Awaited
            if self._pipeline is not None:
                drawn = _Awaited(self._pipeline.begin(step, after_layer), sampling)
            else:
                logits = self._decoder.forward(step, after_layer)
                drawn = draw(logits, sampling, step.unread and step.unread.at(step.sampled), self._nucleus)
        self._scheduler.launched(plan)
        return _Launched(plan, sampling, drawn)

    def _read(self, launched: _Launched) -> StepResult:
        """Waits for its tokens, and so for all that it computes."""
        choices = launched.drawn.read()
        plan, sampling = launched.plan, launched.sampling
        prefills = [chunk for chunk in plan.chunks if chunk.prefills]
        progress = [
            Progress(chunk.sequence.key, chunk.stop, chunk.sequence.prefill_end)
            for chunk in prefills
            if self._scheduler.has(chunk.sequence)
        ]
        taken = self._scheduler.commit(sampling, [choice.token for choice in choices])
        self.steps += 1
        leaving, self._leaving = self._leaving, []
        for key in leaving:
            self.release(key)
        return StepResult(
            started=[sequence.key for sequence in plan.started],
            progress=progress,
            sampled=[
                Sampled(sequence.key, token.offset, choice.token, choice.logprobs, token.finished)
                for sequence, choice, token in zip(sampling, choices, taken, strict=True)
                if token is not None
            ],
            batch_size=len(plan.chunks),
            prefill_tokens=sum(chunk.stop - chunk.start for chunk in prefills),
            refused=launched.refused,
        )

    def _give_back(self, key: Fence) -> None:
        self.prefixes.release(key)
        self.ledger.release(Owner(OwnerKind.SEQUENCE, key))

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
        # While a chunk goes through all stages, others do so behind it.
        token_seconds = max(0.0, chunk_seconds - step_seconds) / max(1, tokens - 1) / config.grid.stages
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
        choose(self._decoder.forward(build_step(chunks)), [chunk.sequence for chunk in chunks], self._nucleus)


def _is_ahead(wanted: Switch, device: str, rank: Rank) -> bool:
    """Whether steps are launched before the one before them has been read. Raises `ConfigError` if they can't be."""
    if wanted is Switch.ALWAYS and rank.size > 1:
        raise ConfigError("decode.scheduling.ahead: the tokens of a step are known to one of several ranks only")
    return wanted is Switch.ALWAYS or (wanted is Switch.AUTO and device != "cpu" and rank.size == 1)

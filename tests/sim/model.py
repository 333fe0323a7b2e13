"""A model whose next token depends on every token before, and on the KV that says so; it needs no tensor.

KV of a token is one word: a hash of the token and of the KV before it. The next token is a hash of the last word and
the request's seed. So a wrong prefix, a page of somebody else, a lost, repeated or changed token shows in every token
from there on. The words lie in real memory, page by page, so the real transfer engine of the tests copies them and the
real digests cover them.

`installed` puts it below `engine.engine`: all else of the engine is the real one, scheduler, ledger and prefix cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from cluster.config import Kernels
from cluster.layout import KVLayout
from cluster.messages import Sampling, Speed
from engine import engine, engine_config, loaded_model
from engine.batch import Sampled
from engine.engine import Engine, EngineConfig, StepPlan, StepResult
from engine.pages import Owner, OwnerKind
from engine.sampler import Choice
from engine.scheduler import Chunk
from engine.sequence import Sequence as EngineSequence
from tests.sim.kernel import Violation

PAGE_SIZE = 4
VOCABULARY = 64
CONTEXT = 96
WORD = 8
_MASK = (1 << 64) - 1


def extend(kv: int, token: int) -> int:
    """KV of `token` after KV `kv`; never 0, which is what fresh memory has."""
    return ((kv ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK | 1


def choose(kv: int, seed: int) -> int:
    """The token that follows the one with KV `kv`."""
    return ((kv ^ (seed * 0xD6E8FEB86659FD93 & _MASK)) * 0xFF51AFD7ED558CCD & _MASK) >> 40 & (VOCABULARY - 1)


def chain(tokens: Sequence[int]) -> list[int]:
    """KV of each of these tokens."""
    words, kv = [], 0
    for token in tokens:
        kv = extend(kv, token)
        words.append(kv)
    return words


def reference(prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """The output of an undisturbed run, the stop token included."""
    kv = chain(prompt)[-1]
    output: list[int] = []
    while len(output) < sampling.max_tokens:
        token = choose(kv, sampling.seed)
        output.append(token)
        if token in sampling.stop_token_ids:
            break
        kv = extend(kv, token)
    return output


class SimMemory:
    """In place of `engine.kv_cache.KVCache`: words, in pages, in ordinary memory."""

    def __init__(self, layout: KVLayout, pages: int, device: object, dtype: object) -> None:
        self.pages = pages
        self.page_bytes = layout.page_bytes
        self.device = "cpu"
        self.nbytes = pages * layout.page_bytes
        self._buffer = (ctypes.c_uint64 * (self.nbytes // WORD))()
        self.address = ctypes.addressof(self._buffer)
        self.words = memoryview(self._buffer).cast("B").cast("Q")
        self.pool = torch.empty(0)
        """Says that this is a CPU's."""


class SimStep(NamedTuple):
    """In place of `engine.decoder.Step`."""

    chunks: list[Chunk]
    before: Sampled | None
    """What the step before has sampled, if that is unread."""
    unread: None = None

    def tokens(self, chunk: Chunk) -> list[int]:
        """Of its sequence, up to the chunk's end."""
        sequence = chunk.sequence
        known = sequence.tokens(0, chunk.stop)
        if not sequence.unread:
            return known
        assert self.before is not None
        return [*known, self.before.tokens[self.before.keys.index(sequence.key)]]


class SimLogits(NamedTuple):
    words: list[int]
    """The last KV of each chunk that samples."""
    land: Callable[[], None]
    """Writes the step's KV, which is not there at once: a device is behind its host."""


class SimDecoder:
    """In place of a decoder: reads and checks the KV that a step stands on, and adds its own, at the last moment: when
    its tokens are read, or when the next step is launched."""

    kernels = Kernels.TORCH
    weight_bytes = 0

    def __init__(self, memory: SimMemory) -> None:
        self._words = memory.words
        self._late: dict[int, int] = {}
        """What is still to be written, by address."""

    def forward(self, step: SimStep, between_layers: Callable[[], None]) -> SimLogits:
        """Raises `Violation` for a sequence that stands on wrong KV."""
        between_layers()
        self._land(self._late)
        late = self._late = {}
        words = [kv for kv in (self._compute(chunk, step.tokens(chunk)) for chunk in step.chunks) if kv]
        return SimLogits(words, lambda: self._land(late))

    def _land(self, late: dict[int, int]) -> None:
        for address, word in late.items():
            self._words[address] = word
        late.clear()

    def _compute(self, chunk: Chunk, tokens: list[int]) -> int:
        sequence, words = chunk.sequence, self._words
        pages = sequence.pages
        expected = chain(tokens)
        for index in range(-(-chunk.start // PAGE_SIZE)):
            begin, count = index * PAGE_SIZE, min(PAGE_SIZE, chunk.start - index * PAGE_SIZE)
            at = pages[index] * PAGE_SIZE
            if words[at : at + count].tolist() != expected[begin : begin + count]:
                raise Violation(f"{sequence.key} reads wrong KV in page {pages[index]}, positions from {begin} on")
        for position in range(chunk.start, chunk.stop):
            self._late[pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE] = expected[position]
        return expected[-1] if chunk.samples else 0


class SimEngine(Engine):
    """The real engine over the simulated model. `work` is called in the middle of each step, with the tokens computed
    and with what is to be done between two layers; it lets time pass."""

    def __init__(
        self,
        config: EngineConfig,
        work: Callable[[int, Callable[[], None]], None],
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config, on_layer)
        self._work = work
        self._writing: StepPlan | None = None
        """Ahead: the step whose KV is still to be written."""

    def execute(self, plan: StepPlan, between_layers: Callable[[], None] = lambda: None) -> StepResult:
        return super().execute(plan, self._worked(plan, between_layers))

    def compute(self, plan: StepPlan | None, between_layers: Callable[[], None] = lambda: None) -> StepResult | None:
        if self._writing is not None:
            self._require_own_pages(self._writing)
        if not self._ahead or plan is None:
            self._writing = None
            return super().compute(plan, between_layers)
        self._writing = plan
        return super().compute(plan, self._worked(plan, between_layers))

    def _worked(self, plan: StepPlan, between_layers: Callable[[], None]) -> Callable[[], None]:
        self._require_own_pages(plan)
        tokens = sum(chunk.stop - chunk.start for chunk in plan.chunks)
        return lambda: self._work(tokens, between_layers)

    def warm_up(self) -> Speed:
        return Speed(step_seconds=0.01, prompt_token_seconds=0.001, prompt_tokens_beside_decodes=PAGE_SIZE)

    def _require_own_pages(self, plan: StepPlan) -> None:
        """A step writes to pages that the ledger gives to its sequence, and to no others."""
        for chunk in plan.chunks:
            key, pages = chunk.sequence.key, chunk.sequence.pages
            own = {*self.ledger.pages_of(Owner(OwnerKind.SEQUENCE, key)), *self.prefixes.pages_of(key)}
            written = set(pages[chunk.start // PAGE_SIZE : -(-chunk.stop // PAGE_SIZE)])
            if not written <= own:
                raise Violation(f"{key} writes to pages {sorted(written - own)}, which are not its own")

    def require_sound(self) -> None:
        """Raises unless every page has one owner, and the prefix cache agrees."""
        self.ledger.check()
        self.prefixes.check()
        if self.pages_used != sum(self.owners().values()):
            raise Violation(f"{self.pages_used} pages in use, but their owners have {self.owners()}")


class _Architecture(NamedTuple):
    """One layer and one head of two numbers: a token's KV, keys and values, has eight bytes."""

    context_length: int = CONTEXT
    vocab_size: int = VOCABULARY
    layers: int = 1
    kv_heads: int = 1
    head_dim: int = 2


class _Weights(NamedTuple):
    identity: str = "sim"
    precision: str = "sim"


class _Files(NamedTuple):
    config: _Architecture = _Architecture()
    weights: _Weights = _Weights()


class SimDrawn:
    """In place of `engine.sampler.Drawn`."""

    def __init__(self, logits: SimLogits, sequences: Sequence[EngineSequence], unread: None, nucleus: None) -> None:
        self.tokens = [choose(kv, one.sampling.seed) for kv, one in zip(logits.words, sequences, strict=True)]
        self._land = logits.land

    def read(self) -> list[Choice]:
        self._land()
        return [Choice(token, None) for token in self.tokens]


@contextmanager
def installed() -> Iterator[None]:
    """Inside, engines are made over this model."""
    with (
        mock.patch.multiple(engine_config, resolve_model=Path),
        mock.patch.multiple(
            loaded_model,
            open_model=lambda path, weights: _Files(),
            open_device=lambda *settings: torch.device("cpu"),
            resolve_dtype=lambda dtype, device: dtype,
            KVCache=SimMemory,
            make_decoder=lambda kernels, architecture, weights, cache, *rest, **named: SimDecoder(cache),
        ),
        mock.patch.multiple(engine, build_step=SimStep, draw=SimDrawn),
    ):
        yield

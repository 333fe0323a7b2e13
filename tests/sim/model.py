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

from cluster.config import Kernels
from cluster.layout import KVLayout
from cluster.messages import Sampling, Speed
from engine import engine, engine_config, loaded_model
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


class SimDecoder:
    """In place of a decoder: reads and checks the KV that a step stands on, and adds its own."""

    kernels = Kernels.TORCH
    weight_bytes = 0

    def __init__(self, memory: SimMemory) -> None:
        self._words = memory.words

    def forward(self, chunks: list[Chunk], between_layers: Callable[[], None]) -> list[int]:
        """The last KV word of each chunk that samples. Raises `Violation` for a sequence that stands on wrong KV."""
        between_layers()
        return [kv for kv in (self._compute(chunk) for chunk in chunks) if kv]

    def _compute(self, chunk: Chunk) -> int:
        sequence, words = chunk.sequence, self._words
        tokens, pages = sequence.tokens(0, chunk.stop), sequence.pages
        expected = chain(tokens)
        for index in range(-(-chunk.start // PAGE_SIZE)):
            begin, count = index * PAGE_SIZE, min(PAGE_SIZE, chunk.start - index * PAGE_SIZE)
            at = pages[index] * PAGE_SIZE
            if words[at : at + count].tolist() != expected[begin : begin + count]:
                raise Violation(f"{sequence.key} reads wrong KV in page {pages[index]}, positions from {begin} on")
        for position in range(chunk.start, chunk.stop):
            words[pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE] = expected[position]
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

    def execute(self, plan: StepPlan, between_layers: Callable[[], None] = lambda: None) -> StepResult:
        self._require_own_pages(plan)
        tokens = sum(chunk.stop - chunk.start for chunk in plan.chunks)
        return super().execute(plan, lambda: self._work(tokens, between_layers))

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


def _choices(words: list[int], sequences: Sequence[EngineSequence]) -> list[Choice]:
    return [Choice(choose(kv, one.sampling.seed), None) for kv, one in zip(words, sequences, strict=True)]


@contextmanager
def installed() -> Iterator[None]:
    """Inside, engines are made over this model."""
    with (
        mock.patch.multiple(engine_config, resolve_model=Path),
        mock.patch.multiple(
            loaded_model,
            open_model=lambda path, weights: _Files(),
            open_device=lambda *settings: None,
            resolve_dtype=lambda dtype, device: dtype,
            KVCache=SimMemory,
            make_decoder=lambda kernels, architecture, weights, cache, *settings: SimDecoder(cache),
        ),
        mock.patch.multiple(engine, build_step=lambda chunks: chunks, choose=_choices),
    ):
        yield

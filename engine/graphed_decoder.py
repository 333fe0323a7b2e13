"""Decode steps as CUDA graphs: the kernels of a step are recorded once per batch size, and replayed by one command.

A small model's step has a thousand kernels of a few microseconds each: launched one by one, the device waits for the
host. A graph has the addresses of all that it reads and writes, so tokens, positions, pages and logits have memory that
stays, and a step writes what it is about there first. Batches are padded to the next recorded size; what padding
computes goes to a page of the pool that no ledger gives out.

Steps that are not all decodes, or are larger than the largest recorded one, are computed as ever. The graphs share
one pool of memory: no two of them run at the same time.

The host has no part between the layers of a graph. What a worker does there, handoffs and a sign of progress, it does
once, when it has launched the step: that takes milliseconds, and transfers have a thread of their own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.logging import get_logger
from engine.attention.base import FixedAttention, Span
from engine.decoder import Step
from engine.kv_cache import KVCache
from engine.shapes import rounded
from engine.torch_decoder import TorchDecoder
from engine.transit import staged

log = get_logger(__name__)

Replay = Callable[[], None]
Record = Callable[[Callable[[], None]], Replay]
"""Makes something of a computation that does it again: the same kernels, over the same memory."""

LARGEST = 512
"""Sequences: with more, the device has enough to do for the host to keep up."""
STEP = 8
"""Least step of the sizes from there on."""
TRIES = 2
"""Of a computation before it is recorded: libraries compile, choose and reserve when they are first used."""


def graph_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... up to the first that is `largest` or more, eight per doubling at most."""
    sizes = [1]
    while sizes[-1] < min(largest, LARGEST):
        sizes.append(2 * sizes[-1] if sizes[-1] < STEP else rounded(sizes[-1] + 1, STEP))
    return sizes


class CudaGraphs:
    """Records with CUDA; what it has recorded shares memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Callable[[], None]) -> Replay:
        """Raises `RuntimeError` for a computation that can't be recorded, because the host has a part in it."""
        with torch.cuda.device(self._device):
            current, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(TRIES):
                    compute()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                compute()
        return graph.replay


class _Graph(NamedTuple):
    """Of steps of `size` sequences."""

    size: int
    inputs: Tensor
    """int64 [2, size]: tokens and positions."""
    attention: FixedAttention
    logits: Tensor
    """float32 [size, vocabulary]"""
    replay: Replay


class GraphedDecoder:
    """Implements `Decoder` around one that computes by itself, on one device."""

    def __init__(self, inner: TorchDecoder, record: Record, *, required: bool = False) -> None:
        """`required`: raise `ConfigError` in `warm_up` where nothing can be recorded; else `inner` computes all."""
        self.kernels = inner.kernels
        self.weight_bytes = inner.weight_bytes
        self._inner = inner
        self._record = record
        self._required = required
        self._graphs: list[_Graph] = []
        """By size."""

    def forward(self, step: Step, between_layers: Callable[[], None] = lambda: None) -> Tensor:
        rows = len(step.tokens)
        decodes = rows == len(step.spans) == len(step.sampled)
        if not decodes or not self._graphs or rows > self._graphs[-1].size:
            return self._inner.forward(step, between_layers)
        graph = self._graphs[bisect_left(self._graphs, rows, key=lambda graph: graph.size)]
        self._place(graph, step)
        graph.replay()
        between_layers()
        return graph.logits[:rows]

    def use(self, cache: KVCache) -> None:
        self._inner.use(cache)

    def warm_up(self, page: int, rows: int, running: int, context: int) -> None:
        self._inner.warm_up(page, rows, running, context)
        try:
            # The largest first: the others then fit into its memory.
            for size in reversed(graph_sizes(running)):
                self._graphs.insert(0, self._recorded(size, context))
        except (RuntimeError, ConfigError) as error:
            self._graphs.clear()
            if self._required:
                raise ConfigError(f"model.graphs: decode steps can't be recorded: {error}") from error
            log.warning("decode steps without CUDA graphs, which are slower", reason=str(error))
        else:
            log.info("decode steps are recorded", sizes=[graph.size for graph in self._graphs])

    def _recorded(self, size: int, context: int) -> _Graph:
        inner, device = self._inner, self._inner.device
        attention = inner.fixed_attention(size, context)
        if attention is None:
            raise ConfigError("only flashinfer's attention can be recorded")
        attention.place(self._padding(size))
        inputs = torch.zeros(2, size, dtype=torch.int64, device=device)
        # One for all sizes: whoever wants a step's logits is done with them when the next one runs.
        logits = self._graphs[-1].logits[:size] if self._graphs else _float32(size, inner.vocabulary, device)

        def compute() -> None:
            logits.copy_(inner.decode(inputs[0], inputs[1], attention))

        return _Graph(size, inputs, attention, logits, self._record(compute))

    def _place(self, graph: _Graph, step: Step) -> None:
        """Says what the graph computes when it runs next."""
        rows = len(step.tokens)
        inputs = np.zeros((2, graph.size), dtype=np.int64)
        inputs[:, :rows] = step.tokens, step.positions
        graph.inputs.copy_(staged(torch.from_numpy(inputs), graph.inputs.device), non_blocking=True)
        if step.unread is not None:
            step.unread.put_into(graph.inputs[0])
        graph.attention.place([*step.spans, *self._padding(graph.size - rows, rows)])

    def _padding(self, count: int, first_row: int = 0) -> list[Span]:
        """Sequences that nobody asked for, of one token each."""
        pages = [self._inner.spare_page]
        return [Span(row, 0, 1, pages) for row in range(first_row, first_row + count)]


def _float32(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, columns, dtype=torch.float32, device=device)

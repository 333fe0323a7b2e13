"""How rank 0 leads the other ranks through its steps: each frame to a follower is one thing to do, in order.

    rank 0 -> follower    WarmUp, RunStep, and within a step GoOn or another RunStep

Between two layers rank 0 may compute another step (`Engine.overtake`), and only it knows. So followers wait there,
until they are told to go on: a few microseconds beside a layer's two sums over ranks. Not where the layers are divided
among stages: there a step is on its way through them while rank 0 begins the next, and none overtakes another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Union

import msgspec
import numpy as np
import torch
from torch import Tensor

from cluster.ranks import Frames
from engine.attention.base import Span
from engine.decoder import Decoder, Step
from engine.kv_cache import KVCache
from engine.line import Line


class WarmUp(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """`Decoder.warm_up`."""

    page: int
    rows: int
    running: int
    context: int


class RunStep(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """`Decoder.forward`. Spans are (start, stop, pages); `pauses`: wait for `GoOn` after each layer."""

    tokens: list[int]
    spans: list[tuple[int, int, list[int]]]
    sampled: list[int]
    pauses: bool

    @classmethod
    def of(cls, step: Step, *, pauses: bool) -> RunStep:
        spans = [(span.start, span.stop, list(span.pages)) for span in step.spans]
        return cls(step.tokens.tolist(), spans, step.sampled.tolist(), pauses)

    def step(self) -> Step:
        """As it was."""
        spans: list[Span] = []
        row = 0
        for start, stop, pages in self.spans:
            spans.append(Span(row, start, stop, pages))
            row += stop - start
        positions = np.concatenate([np.arange(span.start, span.stop) for span in spans])
        return Step(np.array(self.tokens), positions, spans, np.array(self.sampled, dtype=np.int64))


class GoOn(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """With the next layer of the step that was interrupted."""


Order = Union[WarmUp, RunStep, GoOn]
_GO_ON = msgspec.msgpack.encode(GoOn())


class LeadingDecoder:
    """Implements `Decoder` on rank 0: each step is `inner`'s, rank 0's part of the model, and the followers'. With a
    `line`, the layers are divided among stages, of which rank 0 is in the first."""

    def __init__(self, inner: Decoder, followers: Sequence[Frames], line: Line | None = None) -> None:
        self.kernels = inner.kernels
        self._inner = inner
        self._followers = followers
        self._line = line
        self._depth = 0
        """Steps that are being computed, one within the other."""

    @property
    def stages(self) -> int:
        """Steps that can be on their way at the same time."""
        return 1 if self._line is None else self._line.stages

    def begin(self, step: Step, between_layers: Callable[[], None]) -> Callable[[], Tensor]:
        """Computes rank 0's part of the step, and gives what waits for the rest: its logits, as `forward` gives them,
        but in memory of their own. To be asked for in the order of the steps."""
        if self._line is None:
            logits = self.forward(step, between_layers)
            return lambda: logits
        self._order(msgspec.msgpack.encode(RunStep.of(step, pauses=False)))
        self._inner.forward(step, between_layers)
        return functools.partial(self._line.receive_answer, len(step.sampled))

    def forward(self, step: Step, between_layers: Callable[[], None] = lambda: None) -> Tensor:
        if self._line is not None:
            return self.begin(step, between_layers)()
        pauses = self._depth == 0
        self._order(msgspec.msgpack.encode(RunStep.of(step, pauses=pauses)))

        def pause() -> None:
            between_layers()
            self._order(_GO_ON)

        self._depth += 1
        try:
            return self._inner.forward(step, pause if pauses else between_layers)
        finally:
            self._depth -= 1

    def use(self, cache: KVCache) -> None:
        """Each rank has a cache of its own, and has it before there is anything to lead."""
        self._inner.use(cache)

    def warm_up(self, page: int, rows: int, running: int, context: int) -> None:
        self._order(msgspec.msgpack.encode(WarmUp(page, rows, running, context)))
        self._inner.warm_up(page, rows, running, context)

    def _order(self, frame: bytes) -> None:
        for follower in self._followers:
            follower.send(frame)


class Follower:
    """Another rank: computes its part of the model when rank 0 says so, on the thread that calls `run`. `line`: see
    `LeadingDecoder`. `on_layer` is called after each layer of a step."""

    def __init__(
        self,
        decoder: Decoder,
        leader: Frames,
        line: Line | None = None,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        self._decoder = decoder
        self._leader = leader
        self._line = line
        self._on_layer = on_layer
        self._orders = msgspec.msgpack.Decoder(Order)

    def run(self) -> None:
        """Until rank 0 is gone: raises `RankGone`."""
        with torch.inference_mode():
            while True:
                order = self._next()
                if isinstance(order, WarmUp):
                    self._decoder.warm_up(order.page, order.rows, order.running, order.context)
                elif isinstance(order, RunStep):
                    self._compute(order)

    def _compute(self, order: RunStep) -> None:
        logits = self._decoder.forward(order.step(), self._pause if order.pauses else self._on_layer)
        if self._line is not None:
            self._line.answer(logits)

    def _pause(self) -> None:
        self._on_layer()
        while isinstance(order := self._next(), RunStep):
            self._compute(order)

    def _next(self) -> Order:
        order: Order = self._orders.decode(self._leader.receive())
        return order

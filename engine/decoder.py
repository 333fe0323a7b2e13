"""The forward pass as the engine sees it: one step's tokens in, logits out.

Two decoders compute it: `engine.torch_decoder` on any device, `engine.native` on CPUs with AVX-512. Both read and write
the KV cache that they were made with, and are called on the step loop's thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.config import Kernels
from engine.attention.base import Span
from engine.kv_cache import KVCache
from engine.transit import to_device

Integers = npt.NDArray[np.int64]


class Unread(NamedTuple):
    """Tokens that the step before has sampled and the host has not read."""

    tokens: Tensor
    """int64, of the step before, where they were sampled."""
    sources: Integers
    """Of each row of this step: which of `tokens` is its own; -1: none, the host knows it."""

    def at(self, rows: Integers) -> Unread:
        """Of these rows only."""
        return Unread(self.tokens, self.sources[rows])

    def put_into(self, tokens: Tensor) -> Tensor:
        """`tokens`, of which the first rows are `sources`', with these in their places."""
        sources = to_device(torch.from_numpy(self.sources), tokens.device)
        known = tokens[: len(sources)]
        known.copy_(torch.where(sources < 0, known, self.tokens.index_select(0, sources.clamp_min(0))))
        return tokens


class Step(NamedTuple):
    """The tokens of all sequences of a step, as rows: those of `spans`, in order."""

    tokens: Integers
    """[rows]; 0 where it is `unread`."""
    positions: Integers
    """[rows]"""
    spans: list[Span]
    sampled: Integers
    """The rows whose logits are wanted."""
    unread: Unread | None = None

    def read(self) -> Step:
        """The same, and nothing unread: for who computes on the host. Waits for the step before."""
        if self.unread is None:
            return self
        tokens = self.unread.put_into(torch.from_numpy(self.tokens).to(self.unread.tokens.device))
        return self._replace(tokens=tokens.cpu().numpy(), unread=None)


class Decoder(Protocol):
    """A model's weights, on one device, in one dtype."""

    kernels: Kernels
    """Who computes: never `AUTO`."""
    weight_bytes: int
    """Memory that the weights take, as they are held."""

    def forward(self, step: Step, between_layers: Callable[[], None] = lambda: None) -> Tensor:
        """Stores the step's KV in the spans' pages; returns the float32 logits [len(step.sampled), vocabulary].

        The logits' memory is used again by the next step. `between_layers` is called after each layer: a long prompt's
        step takes a good part of a second. It may call this for another step, whose logits are used before it returns.
        Where a device computes a step from one command, in milliseconds, it is called once, after that.
        """

    def use(self, cache: KVCache) -> None:
        """From now on KV is in this cache, of the same layout; that of before is forgotten. Comes before `warm_up`."""

    def warm_up(self, page: int, rows: int, running: int, context: int) -> None:
        """Makes whatever is made per size, for steps of up to `rows` rows, of which `running` are sampled, and
        sequences of up to `context` tokens. May write to this page only."""

"""The forward pass as the engine sees it: one step's tokens in, logits out.

Two decoders compute it: `engine.torch_decoder` on any device, `engine.native` on CPUs with AVX-512. Both read and write
the KV cache that they were made with, and are called on the step loop's thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from cluster.config import Kernels
from engine.attention.base import Span
from engine.kv_cache import KVCache

Integers = npt.NDArray[np.int64]


class Step(NamedTuple):
    """The tokens of all sequences of a step, as rows: those of `spans`, in order."""

    tokens: Integers
    """[rows]"""
    positions: Integers
    """[rows]"""
    spans: list[Span]
    sampled: Integers
    """The rows whose logits are wanted."""


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
        """

    def use(self, cache: KVCache) -> None:
        """From now on KV is in this cache, of the same layout; that of before is forgotten. Comes before `warm_up`."""

    def warm_up(self, page: int, rows: int, running: int, context: int) -> None:
        """Makes whatever is made per size, for steps of up to `rows` rows, of which `running` are sampled, and
        sequences of up to `context` tokens. May write to this page only."""

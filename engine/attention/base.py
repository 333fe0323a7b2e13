"""What attention must do for the model, whatever the device.

`engine.torch_decoder` calls `plan` once per step, with all sequences of the step, and `attend` once per layer, in
order; both on the step loop's thread. The backend reads and writes the KV cache that it was made with and owns nothing
but its work space. A step may be planned and computed between two layers of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Span(NamedTuple):
    """Positions [start, stop) of one sequence, computed in rows [row, row + stop - start) of the step.

    `pages` are the sequence's, from position 0 on, at least up to `stop`. KV of positions below `start` is in them.
    """

    row: int
    start: int
    stop: int
    pages: Sequence[int]


class StepAttention(Protocol):
    """Attention of one step."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores `key` and `value` in the layer's pages, then attends causally, each row within its own sequence.

        query [rows, heads, head_dim]; key, value [rows, kv_heads, head_dim]; any strides. Returns
        [rows, heads, head_dim], contiguous; what it says in padding rows means nothing. Query head h reads key/value
        head h // (heads / kv_heads).
        """


class FixedAttention(StepAttention, Protocol):
    """Attention of steps of a fixed number of sequences, with one token each, whose kernels a graph may keep: they find
    what a step is about in memory that stays. Its `attend` is called to capture them, and for no step itself."""

    def place(self, spans: Sequence[Span]) -> None:
        """What the kernels compute when they run next. Neither waits for the device nor disturbs what it is at."""


class AttentionBackend(Protocol):
    """Made over one `KVCache` by `engine.torch_decoder`."""

    def warm_up(self, page: int, context: int) -> None:
        """Makes whatever is made per size, for sequences of up to `context` tokens. May write to this page only."""

    def plan(self, spans: Sequence[Span], rows: int) -> StepAttention:
        """Prepares a step of so many rows: those of `spans`, in order, and padding behind them."""

    def fixed(self, sequences: int, context: int) -> FixedAttention | None:
        """For so many sequences of up to `context` tokens; after `warm_up`. None: there are no such kernels."""

"""A plan's chunks as the arrays of one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cluster.messages import Fence
from engine.attention.base import Span
from engine.decoder import Integers, Step, Unread
from engine.scheduler import Chunk

KNOWN = -1
"""Source of a token that the host knows, see `Unread`."""


class Sampled(NamedTuple):
    """What a step has sampled: the tokens, where it was computed, and whose they are."""

    keys: list[Fence]
    tokens: Tensor


def build_step(chunks: Sequence[Chunk], before: Sampled | None = None) -> Step:
    """The chunks' tokens in their order, side by side. `before`: what the step before has sampled, if it is unread."""
    starts = np.array([chunk.start for chunk in chunks])
    counts = np.array([chunk.stop for chunk in chunks]) - starts
    ends = np.cumsum(counts)
    tokens: list[int] = []
    for chunk in chunks:
        tokens += chunk.sequence.tokens(chunk.start, chunk.stop)
        if chunk.sequence.unread:
            tokens.append(0)
    first_rows = ends - counts
    return Step(
        tokens=np.array(tokens),
        positions=np.arange(ends[-1]) + np.repeat(starts - first_rows, counts),
        spans=[
            Span(row, chunk.start, chunk.stop, chunk.sequence.pages)
            for row, chunk in zip(first_rows.tolist(), chunks, strict=True)
        ],
        sampled=ends[[chunk.samples for chunk in chunks]] - 1,
        unread=None if before is None else _unread(chunks, ends - 1, before),
    )


def _unread(chunks: Sequence[Chunk], last_rows: Integers, before: Sampled) -> Unread | None:
    """Who has an unread token has it at its end, and computes it now. None: everybody's are known."""
    places = {key: place for place, key in enumerate(before.keys)}
    sources = np.full(last_rows[-1] + 1, KNOWN)
    for row, chunk in zip(last_rows.tolist(), chunks, strict=True):
        if chunk.sequence.unread:
            sources[row] = places[chunk.sequence.key]
    return Unread(before.tokens, sources) if sources.max() > KNOWN else None

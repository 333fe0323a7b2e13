"""A plan's chunks as the arrays of one step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.attention.base import Span
from engine.decoder import Step
from engine.scheduler import Chunk


def build_step(chunks: Sequence[Chunk]) -> Step:
    """The chunks' tokens in their order, side by side."""
    starts = np.array([chunk.start for chunk in chunks])
    counts = np.array([chunk.stop for chunk in chunks]) - starts
    ends = np.cumsum(counts)
    tokens: list[int] = []
    for chunk in chunks:
        tokens += chunk.sequence.tokens(chunk.start, chunk.stop)
    first_rows = ends - counts
    return Step(
        tokens=np.array(tokens),
        positions=np.arange(ends[-1]) + np.repeat(starts - first_rows, counts),
        spans=[
            Span(row, chunk.start, chunk.stop, chunk.sequence.pages)
            for row, chunk in zip(first_rows.tolist(), chunks, strict=True)
        ],
        sampled=ends[[chunk.samples for chunk in chunks]] - 1,
    )

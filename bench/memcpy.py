"""The yardstick of a handoff: a plain copy of as many bytes, in scattered pages of the same size, by one thread."""

from __future__ import annotations

import random
import time

import msgspec
import numpy as np

from bench.statistics import percentile

REPEATS = 7
POOL_FACTOR = 4


class Copied(msgspec.Struct, frozen=True):
    page_bytes: int
    pages: int
    seconds: float
    """Of the median repetition."""

    @property
    def gigabytes_per_second(self) -> float:
        """10^9 bytes a second."""
        return self.page_bytes * self.pages / self.seconds / 1e9


def measure_memcpy(page_bytes: int, pages: int, seed: int = 0) -> Copied:
    """Copies `pages` pages from random places of one buffer to random places of another, page by page, as a handoff has
    to. Pages are touched before, so that no page fault is in the figure; each repetition draws new places in buffers
    several times as large, so that caches help no more than they would help a handoff."""
    draw = random.Random(seed)
    places = range(POOL_FACTOR * pages)
    source = np.ones((len(places), page_bytes), dtype=np.uint8)
    target = np.ones_like(source)
    taken = []
    for _ in range(REPEATS):
        pairs = list(zip(draw.sample(places, pages), draw.sample(places, pages), strict=True))
        begun = time.perf_counter()
        for origin, goal in pairs:
            target[goal] = source[origin]
        taken.append(time.perf_counter() - begun)
    return Copied(page_bytes, pages, percentile(taken, 50))

"""The sampler's only randomness: a number in [0, 1) that belongs to (request seed, token position) alone.

So a request that moves to another worker, or runs in another batch, draws what it would have drawn. Counter-based:
SplitMix64's finalizer (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014) over the seed and then
the position.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_WORD = (1 << 64) - 1


def uniform(seeds: Iterable[int], positions: Iterable[int]) -> npt.NDArray[np.float64]:
    """One number for each (seed, position). Seeds are taken modulo 2^64."""
    seed = np.array([seed & _WORD for seed in seeds], dtype=np.uint64)
    position = np.fromiter(positions, dtype=np.uint64)
    word = _mix(_mix(seed + _GAMMA) + (position + np.uint64(1)) * _GAMMA)
    # 52 bits: the largest number times any float64 is still below that float64.
    return (word >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(word: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    word = (word ^ (word >> np.uint64(30))) * _FIRST
    word = (word ^ (word >> np.uint64(27))) * _SECOND
    return word ^ (word >> np.uint64(31))

"""What `python -m engine.measure` prints, for whoever reads it."""

from __future__ import annotations

import msgspec


class EngineSpeed(msgspec.Struct, frozen=True):
    """One engine beside the peaks of the machine, both with so many threads."""

    dtype: str
    threads: int
    kernels: str
    product_flops_per_second: float
    """Of a square product, weights packed beforehand; an addition and a multiplication count as two."""
    read_bytes_per_second: float
    prefill_tokens_per_second: float
    """Of one long prompt."""
    prefill_share_of_peak: float
    decode_tokens_per_second: dict[int, float]
    """By batch size."""
    decode_share_of_reading: float
    """Of one sequence: time to read the weights once / time of a step."""

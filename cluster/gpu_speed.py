"""What `python -m engine.measure_gpu` prints, for whoever reads it: an engine's times, and what bounds them."""

from __future__ import annotations

import msgspec


class DecodePoint(msgspec.Struct, frozen=True):
    """Steps that give one token to each of `batch` sequences of about `context` tokens."""

    batch: int
    context: int
    step_seconds: float
    read_bytes: int
    """Weights and KV that a step can't do without."""
    idle_share: float | None
    """Of the time, how long the device waited for the host; None where nobody could tell."""


class PrefillPoint(msgspec.Struct, frozen=True):
    """One prompt, from its submission to its first token."""

    tokens: int
    seconds: float
    operations: float
    """Additions and multiplications of its products and its attention."""


class GpuSpeed(msgspec.Struct, frozen=True):
    """One model on one device."""

    model: str
    device: str
    """Its name."""
    dtype: str
    chunk_tokens: int
    copied_bytes_per_second: float
    """Of a large copy within the device, reading and writing both counted."""
    operations_per_second: float
    """Of a large square product."""
    decode: list[DecodePoint]
    prefill: list[PrefillPoint]

    def floor_share(self, point: DecodePoint) -> float:
        """How much of a step its reading alone would take, at the speed of a copy."""
        return point.read_bytes / self.copied_bytes_per_second / point.step_seconds

    def rate_share(self, point: PrefillPoint) -> float:
        """How much of a prompt's time its arithmetic alone would take, at the product's rate."""
        return point.operations / self.operations_per_second / point.seconds

"""Where an attempt's time went, as its workers tell it at its end. By their own clocks, in seconds."""

from __future__ import annotations

import msgspec


class PrefillTimings(msgspec.Struct, frozen=True):
    queue_seconds: float
    """Received by the worker until its first chunk began."""
    compute_seconds: float
    """First chunk began until the last was computed, its token sampled; steps of others in between included."""
    tokens: int
    cached_tokens: int
    chunks: int


class HandoffTimings(msgspec.Struct, frozen=True):
    grant_wait_seconds: float
    """OFFER sent until GRANT received."""
    write_seconds: float
    """Time with at least one write under way."""
    exposed_seconds: float
    """Last chunk computed until ACK: what the handoff added to the request, and the way of the ACK on top."""
    pages: int
    """Written to decode."""
    bytes: int
    tail_seconds: float = 0.0
    """Of the exposed time, the part until DONE left: the last pages went out, or the grant was still awaited."""
    skipped_pages: int = 0
    """Not sent: decode had them already."""
    batches: int = 0
    """Posts to the transfer engine."""


class DecodeTimings(msgspec.Struct, frozen=True):
    await_seconds: float
    """Attempt received until KV verified (or, unified, until prefilled)."""
    decode_seconds: float
    """From then on until its last token."""
    steps: int
    batch_sum: int
    """Sum over its steps of the batch size; / steps = the mean batch it ran in."""
    prefill: PrefillTimings | None = None
    """Unified only."""
    batch_max: int = 0
    lease_seconds: float = 0.0
    """OFFER taken up until its pages were granted: the queue for pages."""
    verify_seconds: float = 0.0
    """DONE received until the pages were compared with their digests."""
    first_step_seconds: float = 0.0
    """KV verified until its first token here: the rest of the step that was under way, and its own first step."""

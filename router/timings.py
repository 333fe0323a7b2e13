"""What the workers told of one choice's time, put together over its attempts. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings


@dataclass
class LegTimings:
    """The prompt's own prefill and handoff are the first attempt's that tells them; decoding is the work of all."""

    prefill: PrefillTimings | None = None
    handoff: HandoffTimings | None = None
    decode: DecodeTimings | None = None

    def add(self, prefill: PrefillTimings | None, handoff: HandoffTimings | None, decode: DecodeTimings | None) -> None:
        unified = decode.prefill if decode else None
        self.prefill = self.prefill or prefill or unified
        self.handoff = self.handoff or handoff
        self.decode = _together(self.decode, decode)


def _together(before: DecodeTimings | None, after: DecodeTimings | None) -> DecodeTimings | None:
    """Of two attempts at one request."""
    if before is None or after is None:
        return before or after
    return DecodeTimings(
        await_seconds=before.await_seconds + after.await_seconds,
        decode_seconds=before.decode_seconds + after.decode_seconds,
        steps=before.steps + after.steps,
        batch_sum=before.batch_sum + after.batch_sum,
        prefill=before.prefill,
        batch_max=max(before.batch_max, after.batch_max),
        lease_seconds=before.lease_seconds + after.lease_seconds,
        verify_seconds=before.verify_seconds + after.verify_seconds,
        first_step_seconds=before.first_step_seconds,
    )

"""What is said of a GPU."""

from __future__ import annotations

import msgspec

from bench.gpu.measure import HANDED_TOKENS, Measured
from bench.machine import Setting
from bench.report import ABSENT, Page, Table, number, spread
from bench.targets import Target, at_least, at_most, targets_table

DECODE_SHARE = 0.8
"""Of a step, at least: the time to read weights and KV once, at the speed of a copy."""
PREFILL_SHARE = 0.7
"""Of a prompt's time, at least: its arithmetic at the rate of a large product."""
EXPOSED_SHARE = 0.03
"""Of prefill's time, at most."""
IDLE_SHARE = 0.05
"""Of decode steps' time, at most."""
_MILLI = 1e3


class GpuReport(msgspec.Struct, frozen=True, tag_field="kind", tag="gpu"):
    setting: Setting
    seed: int
    models: list[Measured]

    @property
    def targets(self) -> list[Target]:
        found = []
        for each in self.models:
            speed = each.speed
            for decode in speed.decode:
                label = f"{speed.model}, batch {decode.batch}"
                found.append(at_least(f"{label}: reading / decode step", speed.floor_share(decode), DECODE_SHARE))
                found.append(at_most(f"{label}: device waits for the host", decode.idle_share, IDLE_SHARE))
            for prefill in speed.prefill:
                label = f"{speed.model}, {prefill.tokens:,} tokens: arithmetic / prefill"
                found.append(at_least(label, speed.rate_share(prefill), PREFILL_SHARE))
            share = None if each.exposed is None else each.exposed.share.median
            label = f"{speed.model}, {HANDED_TOKENS:,} tokens: exposed handoff / prefill"
            found.append(at_most(label, share, EXPOSED_SHARE))
        return found

    @property
    def page(self) -> Page:
        tables = [self._ceilings(), self._decodes(), self._prefills(), self._handoffs(), targets_table(self.targets)]
        notes = [
            "Medians. Floor of a decode step: weights and KV read once, at the speed of a copy (reading and writing "
            "counted). Floor of a prompt: its products and its attention at the rate of a large square product.",
            "The device waits: the share of time in which none of its kernels or copies runs, while step follows step.",
            "Handoff: prefill and decode worker on the same GPU, by NIXL; exposed is from the last chunk's end until "
            "decode has taken over and its word has come back. Models without weights of their own have random ones.",
        ]
        return Page("gpu", "One GPU: steps beside their floors", tables, notes)

    def _ceilings(self) -> Table:
        headers = ["", "device", "copies, GB/s", "products, TFLOP/s", "dtype"]
        rows = [
            [
                speed.model,
                speed.device,
                number(speed.copied_bytes_per_second / 1e9),
                number(speed.operations_per_second / 1e12),
                speed.dtype,
            ]
            for speed in (each.speed for each in self.models)
        ]
        return Table("Ceilings", headers, rows)

    def _decodes(self) -> Table:
        headers = ["", "batch", "context", "step, ms", "floor, ms", "floor / step", "device waits"]
        rows = []
        for speed in (each.speed for each in self.models):
            for point in speed.decode:
                floor = point.read_bytes / speed.copied_bytes_per_second
                idle = ABSENT if point.idle_share is None else f"{point.idle_share:.1%}"
                step = number(point.step_seconds * _MILLI)
                sizes = [str(point.batch), f"{point.context:,}"]
                rows.append(
                    [speed.model, *sizes, step, number(floor * _MILLI), f"{speed.floor_share(point):.0%}", idle]
                )
        return Table("Decode", headers, rows)

    def _prefills(self) -> Table:
        headers = ["", "prompt", "chunks of", "to the first token, ms", "tok/s", "floor / time"]
        rows = [
            [
                speed.model,
                f"{point.tokens:,}",
                f"{speed.chunk_tokens:,}",
                number(point.seconds * _MILLI),
                number(point.tokens / point.seconds),
                f"{speed.rate_share(point):.0%}",
            ]
            for speed in (each.speed for each in self.models)
            for point in speed.prefill
        ]
        return Table("Prefill", headers, rows)

    def _handoffs(self) -> Table:
        headers = ["", "chunks of", "prefill, ms", "exposed, ms", "tail, ms", "exposed / prefill"]
        rows = [
            [
                each.speed.model,
                f"{each.exposed.chunk_tokens:,}",
                spread(each.exposed.prefill_seconds, _MILLI),
                spread(each.exposed.exposed_seconds, _MILLI),
                spread(each.exposed.tail_seconds, _MILLI),
                f"{each.exposed.share.median:.1%}",
            ]
            for each in self.models
            if each.exposed is not None
        ]
        return Table("Exposed handoff", headers, rows)

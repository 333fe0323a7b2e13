"""What is said of handoffs."""

from __future__ import annotations

import msgspec

from bench.handoff.measure import Handed
from bench.machine import Setting
from bench.memcpy import Copied
from bench.report import Page, Table, number, spread
from bench.targets import Target, at_least, at_most, targets_table
from cluster.config import TransferName

EXPOSED_SHARE = {TransferName.NIXL: 0.03, TransferName.MOONCAKE: 0.06}
"""Of prefill's time, at most."""
_MILLI = 1e3


class HandoffReport(msgspec.Struct, frozen=True, tag_field="kind", tag="handoff"):
    """`memcpy` is a plain copy of as many pages within one process."""

    setting: Setting
    seed: int
    handed: list[Handed]
    memcpy: Copied

    @property
    def targets(self) -> list[Target]:
        found = []
        for each in self.handed:
            name = each.transfer.value
            found.append(at_least(f"{name}: bandwidth / that of the bare engine", each.whole.ratio, 0.9))
            label = f"{name}: exposed handoff / prefill, {each.prompt_tokens:,} tokens"
            found.append(at_most(label, each.exposed.share.median, EXPOSED_SHARE[each.transfer]))
        return found

    @property
    def page(self) -> Page:
        names = ", ".join(each.transfer.value for each in self.handed)
        tables = [self._bandwidths(), self._times(), targets_table(self.targets)]
        notes = [
            "Medians (least to most), on a cluster that does nothing else; GB are 10^9 bytes.",
            "Bandwidth: all pages in one batch, as the prompt is one chunk. Baton's time: with a write under way.",
            "The bare engine: two processes on the workers' cores with the workers' environment, pages of random "
            "places, descriptors prepared; it took turns with the cluster. memcpy is within one process.",
            "Exposed: from the last chunk's end until decode has taken over and its word has come back. Tail: the part "
            "of it until the last page had gone out.",
        ]
        return Page("handoff", f"Handoff of KV pages: {names}", tables, notes)

    def _bandwidths(self) -> Table:
        rows = []
        for each in self.handed:
            whole = each.whole
            size = f"{whole.pages} x {whole.page_bytes:,} B"
            rows.append([each.transfer.value, size, spread(whole.baton), spread(whole.bare), number(whole.ratio)])
        size = f"{self.memcpy.pages} x {self.memcpy.page_bytes:,} B"
        rows.append(["memcpy", size, "-", number(self.memcpy.gigabytes_per_second), "-"])
        return Table("Bandwidth", ["", "one batch", "Baton, GB/s", "bare engine, GB/s", "ratio"], rows)

    def _times(self) -> Table:
        headers = ["", "prompt", "chunks of", "prefill, ms", "exposed, ms", "tail, ms", "exposed / prefill"]
        rows = [
            [
                each.transfer.value,
                f"{each.prompt_tokens:,}",
                f"{each.exposed.chunk_tokens:,}",
                spread(each.exposed.prefill_seconds, _MILLI),
                spread(each.exposed.exposed_seconds, _MILLI),
                spread(each.exposed.tail_seconds, _MILLI),
                f"{each.exposed.share.median:.1%}",
            ]
            for each in self.handed
        ]
        return Table("Exposed handoff", headers, rows)

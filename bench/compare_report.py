"""What a comparison says: its table, the trials before it, the targets beside it."""

from __future__ import annotations

import msgspec

from bench.compare import STEADIEST, Comparison, Result
from bench.contenders import NAMES
from bench.machine import Setting
from bench.measure import FIGURES
from bench.report import ABSENT, Page, Table, number, spread
from bench.standstill import NOTE as STANDSTILL
from bench.statistics import DEFINITION
from bench.targets import Target, at_least, at_most, targets_table
from bench.tuning import Tuned, tuning_table
from bench.workload import Workload


class CompareReport(msgspec.Struct, frozen=True, tag_field="kind", tag="compare"):
    """Everything that is needed to judge, or to repeat, a comparison. `tuned` is empty if nothing was tried before."""

    setting: Setting
    workload: Workload
    seed: int
    comparison: Comparison
    tuned: list[Tuned] = []
    percentiles: str = DEFINITION

    @property
    def targets(self) -> list[Target]:
        """Splitting pays if it keeps these, against the better one of the others."""
        found = self.comparison
        split = found.results[0].name
        ratio = found.ratios.get
        return [
            at_most(f"inter-token p99 / p50 of {split}", found.median(split, "inter_token_p99_over_p50"), 1.5),
            at_most(f"inter-token p99 / that of {found.baseline}", ratio("inter_token_p99"), 1 / 3),
            at_most(
                f"inter-token p99 / p50 of {split}, while the machine ran",
                found.median(split, "running_inter_token_p99_over_p50"),
                1.5,
            ),
            at_most(
                f"inter-token p99 / that of {found.baseline}, while the machine ran",
                ratio("running_inter_token_p99"),
                1 / 3,
            ),
            at_least(
                f"prompts and output per second / those of {found.baseline}", ratio("total_tokens_per_second"), 0.9
            ),
            at_most(f"TTFT p50 / that of {found.baseline}", ratio("ttft_p50"), 2.0),
            at_most(f"TTFT p50 of long prompts / that of {found.baseline}", ratio("ttft_long_p50"), 2.0),
        ]

    @property
    def page(self) -> Page:
        names = " against ".join(result.name for result in self.comparison.results)
        tables = [Table(self.workload.description, *_rows(self.comparison)), targets_table(self.targets)]
        if self.tuned:
            tables.append(tuning_table(self.tuned))
        return Page(f"compare-{self.workload.name}", f"{names}, {self.workload.description}", tables, self._notes())

    def _notes(self) -> list[str]:
        results = self.comparison.results
        rounds = len(results[0].rounds)
        errors = {result.name: sum(len(one.errors) for one in result.rounds) for result in results}
        shares = [one.others_share for result in results for one in result.rounds if one.others_share is not None]
        disturbed = [f"Other processes used up to {max(shares):.0%} of these cores."] if shares else []
        return [
            *disturbed,
            f"Medians of {rounds} rounds (least to most). The clusters took turns on the same cores, with the load.",
            f"The ratio is {results[0].name} / {self.comparison.baseline}. "
            f"Errors: {', '.join(f'{name}: {count}' for name, count in errors.items())}.",
            *([f"{NAMES}. Chosen, and compared with: {STEADIEST}."] if self.tuned else []),
            f"Percentiles: {self.percentiles}.",
            "Inter-token: between two successive chunks that carry tokens, at the client.",
            STANDSTILL,
            "A prompt's tokens count when its first token comes.",
            "GB are 10^9 bytes; the handoff's time is that with a write under way.",
        ]


def _rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headers, and one row for each figure that anybody has."""
    results = comparison.results
    rows = []
    for figure in FIGURES:
        cells = [spread(result.figures.get(figure.key)) for result in results]
        if any(cell != ABSENT for cell in cells):
            better = "lower" if figure.lower_is_better else "higher"
            rows.append([figure.label, figure.unit, *cells, number(comparison.ratios.get(figure.key)), better])
    if comparison.memcpy is not None:
        memcpy = comparison.memcpy
        label = f"memcpy of {memcpy.page_bytes * memcpy.pages / 1e6:.0f} MB in {memcpy.pages} pages"
        absent = [ABSENT] * len(results)
        rows.append([label, "GB/s", f"{memcpy.gigabytes_per_second:.2f}", *absent, "higher"])
    return ["", "unit", *[result.name for result in results], "ratio", "better"], rows + _processor_rows(results)


def _processor_rows(results: list[Result]) -> list[list[str]]:
    names = sorted({name for result in results for name in result.cpu_per_thousand_tokens})
    return [
        [f"CPU per 1,000 output tokens, {name}", "s"]
        + [spread(result.cpu_per_thousand_tokens.get(name)) for result in results]
        + [ABSENT, "lower"]
        for name in names
    ]

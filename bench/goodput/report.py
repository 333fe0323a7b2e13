"""What a search for goodput says: who carries how much, and the latency over load behind it."""

from __future__ import annotations

import msgspec

from bench.contenders import BREAK_EVEN, NAMES
from bench.goodput.arrivals import DISTRIBUTION
from bench.goodput.trial import Conditions, Curve
from bench.machine import Setting
from bench.report import ABSENT, Page, Table, number
from bench.standstill import NOTE as STANDSTILL
from bench.statistics import DEFINITION
from bench.targets import Target, at_least, targets_table


class GoodputReport(msgspec.Struct, frozen=True, tag_field="kind", tag="goodput"):
    """The last of `curves` is of the unified cluster that was chosen by the trials in `tried`; the best of the others
    is held against it."""

    setting: Setting
    conditions: Conditions
    curves: list[Curve]
    tried: list[Curve]
    percentiles: str = DEFINITION

    @property
    def targets(self) -> list[Target]:
        *split, unified = self.curves
        best = max(split, key=lambda curve: curve.goodput)
        objective = self.conditions.objective
        raw = max(split, key=lambda curve: curve.raw_goodput(objective))
        raw_ratio = _over(raw.raw_goodput(objective), unified.raw_goodput(objective))
        return [
            at_least(f"goodput of {best.name} / that of {unified.name}", _over(best.goodput, unified.goodput), 1.5),
            at_least(f"the same by the clients' own clocks, {raw.name}", raw_ratio, 1.5),
        ]

    @property
    def page(self) -> Page:
        rates = Table(
            "Goodput",
            ["", "requests/s", "by the clients' clocks"],
            [
                [curve.name, number(curve.goodput), number(curve.raw_goodput(self.conditions.objective))]
                for curve in self.curves
            ],
        )
        tables = [rates, targets_table(self.targets), _loads("Latency over load", self.curves)]
        if self.tried:
            tables.append(_loads("Trials of unified clusters", self.tried))
        return Page("goodput", f"Goodput: {self.conditions.objective.description}", tables, self._notes())

    def _notes(self) -> list[str]:
        conditions = self.conditions
        curves = [*self.curves, *self.tried]
        shares = [one.others_share for curve in curves for one in curve.outcomes if one.others_share is not None]
        disturbed = [f"Other processes used up to {max(shares):.0%} of these cores."] if shares else []
        return [
            *disturbed,
            f"Poisson arrivals for {conditions.seconds:g} s at a rate; {conditions.mix.description} ({DISTRIBUTION}); "
            f"seed {conditions.seed}: at a rate, all clusters get the same requests at the same times.",
            "Rates go up by a factor until one fails; between it and the one before, bisection.",
            f"{NAMES}; {BREAK_EVEN}.",
            "Good, and the goodput, are judged while the machine ran; raw are the clients' own clocks. " + STANDSTILL,
            f"Percentiles: {self.percentiles}.",
        ]


def _over(value: float, other: float) -> float | None:
    return value / other if other else None


def _loads(title: str, curves: list[Curve]) -> Table:
    headers = [
        "", "requests/s", "requests", "good", "raw", "TTFT p50, ms", "TTFT p90, ms", "gap p50, ms", "gap p99, ms",
        "worst gap p90, ms", "tok/s", "errors", "given up", "longest standstill, ms",
    ]  # fmt: skip
    rows = [
        [
            curve.name, number(one.rate), str(one.requests), f"{one.fair_share:.0%}", f"{one.good_share:.0%}",
            *[
                ABSENT if seconds is None else number(seconds * 1e3)
                for seconds in (
                    one.ttft_p50_seconds, one.ttft_p90_seconds, one.gap_p50_seconds, one.gap_p99_seconds,
                    one.worst_gap_p90_seconds,
                )
            ],
            number(one.tokens_per_second), str(len(one.errors)), str(one.unanswered),
            ABSENT if one.standstill_longest_seconds is None else number(one.standstill_longest_seconds * 1e3),
        ]
        for curve in curves
        for one in curve.outcomes
    ]  # fmt: skip
    return Table(title, headers, rows)

"""What a figure should be, beside what it is. A target that is missed is a result, not an error."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from bench.report import ABSENT, Table, number


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """`value` None: nothing was measured for it."""

    label: str
    value: float | None
    limit: float
    at_most: bool

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit


def at_most(label: str, value: float | None, limit: float) -> Target:
    return Target(label=label, value=value, limit=limit, at_most=True)


def at_least(label: str, value: float | None, limit: float) -> Target:
    return Target(label=label, value=value, limit=limit, at_most=False)


def targets_table(targets: Sequence[Target]) -> Table:
    verdicts = {True: "met", False: "not met", None: ABSENT}
    rows = [
        [each.label, number(each.value), f"{'≤' if each.at_most else '≥'} {number(each.limit)}", verdicts[each.met]]
        for each in targets
    ]
    return Table("Targets", ["", "measured", "target", ""], rows)

"""What is said of the control plane."""

from __future__ import annotations

import msgspec

from bench.control_plane.measure import ANSWER_TOKENS, PROMPT_TOKENS, Measured
from bench.machine import Setting
from bench.report import Page, Table, number, spread
from bench.targets import Target, at_most, targets_table

_MILLI = 1e3
_MIB = 2**20


class ControlPlaneReport(msgspec.Struct, frozen=True, tag_field="kind", tag="control-plane"):
    setting: Setting
    heartbeat_seconds: float
    lease_seconds: float
    seconds: float
    sizes: list[Measured]

    @property
    def targets(self) -> list[Target]:
        """Of the largest cluster."""
        most = self.sizes[-1]
        return [
            at_most("bootstrap, idle, percent of a core", most.bootstrap_cpu * 100, 5.0),
            at_most("router, idle, percent of a core", most.router_cpu * 100, 5.0),
            at_most("one placement, ms", most.placed.placement_seconds * _MILLI, 1.0),
            at_most("a broken connection is seen by the router, ms", most.broken.router.most * _MILLI, 100.0),
            at_most("silence is seen by the router, s", most.silent.router.most, self.lease_seconds + 0.5),
        ]

    @property
    def page(self) -> Page:
        tables = [self._idle(), self._requests(), self._losses(), self._anew(), targets_table(self.targets)]
        notes = [
            f"Half of the workers prefill, and follow the roster, as they do; a heartbeat every "
            f"{self.heartbeat_seconds:g} s to bootstrap and to the router, a lease of {self.lease_seconds:g} s, and a "
            "secret to be proven on each link. They are in one process, compute nothing and answer at once.",
            f"Idle: user and system time over {self.seconds:g} s. A request: {PROMPT_TOKENS} prompt, {ANSWER_TOKENS} "
            "output tokens over HTTP; all CPU of the router meanwhile, and of it the choice of workers, by its own "
            "metric (wall time: what else runs on these cores is in it).",
            "Lost: from the end of a worker until it gets no new work (router) or is no member (bootstrap, which waits "
            "for the lease's end: a broken connection alone is no leave). Median (least to most).",
            "Started anew: killed and started at once; until it knows all workers again, the interpreter's start and, "
            "of the router, the tokenizer's in it.",
        ]
        sizes = ", ".join(str(each.workers) for each in self.sizes)
        return Page("control-plane", f"The control plane with {sizes} workers", tables, notes)

    def _idle(self) -> Table:
        headers = ["workers", "bootstrap, % of a core", "router, % of a core", "bootstrap, MiB", "router, MiB"]
        rows = [
            [
                str(each.workers),
                number(each.bootstrap_cpu * 100),
                number(each.router_cpu * 100),
                number(each.bootstrap_bytes / _MIB),
                number(each.router_bytes / _MIB),
            ]
            for each in self.sizes
        ]
        return Table("Idle", headers, rows)

    def _requests(self) -> Table:
        rows = [
            [
                str(each.workers),
                number(each.placed.router_cpu_seconds * _MILLI),
                number(each.placed.placement_seconds * _MILLI),
            ]
            for each in self.sizes
        ]
        return Table("A request", ["workers", "router, ms of CPU", "of it the placement, ms"], rows)

    def _losses(self) -> Table:
        headers = ["workers", "connection broken: router, ms", "bootstrap, s", "silent: router, s", "bootstrap, s"]
        rows = [
            [
                str(each.workers),
                spread(each.broken.router, _MILLI),
                spread(each.broken.bootstrap),
                spread(each.silent.router),
                spread(each.silent.bootstrap),
            ]
            for each in self.sizes
        ]
        return Table("A lost worker", headers, rows)

    def _anew(self) -> Table:
        headers = ["workers", "", "until all are known, s", "bootstrap, s of CPU", "router, s of CPU"]
        rows = [
            [
                str(each.workers),
                name,
                number(anew.seconds),
                number(anew.bootstrap_cpu_seconds),
                number(anew.router_cpu_seconds),
            ]
            for each in self.sizes
            for name, anew in (("bootstrap", each.bootstrap_anew), ("router", each.router_anew))
        ]
        return Table("Started anew", headers, rows)

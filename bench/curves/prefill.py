"""Drives one prefill worker alone: a request for one token has a prefill leg and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from bench.alone import Alone, Asked, Place, cores_of
from bench.curves.curve import PrefillCurve, PrefillPoint
from bench.machine import describe_setting
from bench.statistics import Repeated
from bench.workload import Prompts
from cluster.topology import dump_topology

ALONE = ("prefill.replicas=1", "decode.replicas=1")
"""The decode worker is there because a cluster has one; it gets nothing to do."""


class PrefillGrid(msgspec.Struct, frozen=True):
    """Each length behind each cached prefix, and each number of prompts at once without one."""

    new_tokens: Sequence[int]
    cached_tokens: Sequence[int]
    prompts: Sequence[int]

    def cells(self, context_length: int) -> Iterator[tuple[int, int, int]]:
        """(new tokens, cached tokens, prompts), as far as one token more still fits into the context."""
        for cached in self.cached_tokens:
            for new in self.new_tokens:
                for prompts in self.prompts if cached == 0 else (1,):
                    if cached + new < context_length:
                        yield new, cached, prompts


def profile_prefill(
    place: Place, grid: PrefillGrid, repeats: int, seed: int, tell: Callable[[str], None]
) -> PrefillCurve:
    """Raises `ConfigError`, `LaunchError`."""
    place = place._replace(settings=(*place.settings, *ALONE))
    topology = place.resolve()
    with place.open() as cluster:
        alone = Alone(cluster)
        runs = _Runs(alone, Prompts(seed, alone.vocab_size), topology.kv.page_size)
        points = []
        for new, cached, prompts in grid.cells(alone.context_length):
            points.append(runs.point(new, cached, prompts, repeats))
            tell(_line(points[-1]))
    return PrefillCurve(
        setting=describe_setting(),
        topology=dump_topology(topology),
        model=alone.model,
        cores=cores_of(topology.prefill.cpus),
        repeats=repeats,
        seed=seed,
        points=points,
    )


class _Runs:
    """Measures one point after the other; no two prompts are alike but for the prefix that is to be cached."""

    def __init__(self, alone: Alone, prompts: Prompts, page_size: int) -> None:
        self._alone = alone
        self._prompts = prompts
        self._page_size = page_size
        self._number = 0

    def point(self, new: int, cached: int, prompts: int, repeats: int) -> PrefillPoint:
        prefix = self._prefix(cached)
        taken = []
        # One run more than is counted: sizes that a worker meets for the first time may cost it more.
        for run in range(repeats + 1):
            answers = self._alone.ask([self._request(prefix, new) for _ in range(prompts)])
            if run > 0:
                sent = min(line.sent_at for line in answers)
                taken.append(max(line.arrivals[0] for line in answers) - sent)
        return PrefillPoint(new, len(prefix), prompts, Repeated.over(taken))

    def _prefix(self, tokens: int) -> list[int]:
        """Computed, and so cached, when this returns; whole pages only can be."""
        whole = tokens - tokens % self._page_size
        if whole == 0:
            return []
        self._number += 1
        prefix = self._prompts.prompt("prefix", self._number, whole)
        self._alone.ask([self._request(prefix, 1)])
        return prefix

    def _request(self, prefix: list[int], new: int) -> Asked:
        self._number += 1
        return Asked(prefix + self._prompts.prompt("prefill", self._number, new), 1)


def _line(point: PrefillPoint) -> str:
    seconds = point.first_token_seconds.median
    behind = f" behind {point.cached_tokens} cached" if point.cached_tokens else ""
    return f"{point.prompts} x {point.new_tokens} tokens{behind}: {seconds * 1e3:.0f} ms"

"""Clusters under the same load on the same cores, taking turns: what disaggregation gives, and what it costs."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench.client import OPTIONS, CompletionClient, open_session
from bench.cluster import Cluster
from bench.contenders import Contender
from bench.load import LONG
from bench.measure import FIGURES, HandoffShape, Measurement, measure, typical_handoff
from bench.memcpy import Copied, measure_memcpy
from bench.records import Record, fetch_records
from bench.statistics import Repeated, repeated
from bench.trial import Trial, play
from bench.workload import Prompts, Workload

EVEN = 1.05
"""Two p99 that differ by less than this factor are taken for equal."""
CARRIES = 0.9
"""Of the most tokens that anybody gives: who gives less is not compared by p99."""
STEADIEST = (
    f"of those that give at least {CARRIES:.0%} of the most tokens, prompts and output, the one of least inter-token "
    f"p99; of those within {EVEN - 1:.0%} of it, the one of most tokens"
)


class Result(msgspec.Struct, frozen=True):
    """One contender's rounds, and the median, least and most of each figure over them."""

    name: str
    topology: str
    settings: list[str]
    rounds: list[Measurement]
    figures: dict[str, Repeated]
    cpu_per_thousand_tokens: dict[str, Repeated]
    handoff: HandoffShape | None = None
    """Of a typical handoff of a long prompt; None if nothing is handed over."""


class Comparison(msgspec.Struct, frozen=True):
    """`results[0]` beside the others. `ratios` are its medians / those of `baseline`, the better of the others;
    `memcpy` is of as many bytes as one of its handoffs."""

    results: list[Result]
    baseline: str
    ratios: dict[str, float]
    memcpy: Copied | None

    def median(self, name: str, key: str) -> float | None:
        """Of contender `name`."""
        found = next(result for result in self.results if result.name == name).figures.get(key)
        return None if found is None else found.median


class Round(NamedTuple):
    measurement: Measurement
    handoff: HandoffShape | None


def compare(
    contenders: Sequence[Contender],
    workload: Workload,
    rounds: int,
    seed: int,
    log_dir: Path,
    tell: Callable[[str], None],
) -> Comparison:
    """Measures the contenders, two or more, in turns. Raises `LaunchError`."""
    results = measure_in_turns(contenders, workload, rounds, seed, log_dir, tell)
    baseline = steadiest(results[1:])
    handoff = results[0].handoff
    memcpy = measure_memcpy(*handoff) if handoff is not None else None
    return Comparison(results, baseline.name, _ratios(results[0], baseline), memcpy)


def measure_in_turns(
    contenders: Sequence[Contender],
    workload: Workload,
    rounds: int,
    seed: int,
    log_dir: Path,
    tell: Callable[[str], None],
) -> list[Result]:
    """Starts, measures and stops each of them, `rounds` times; never two at once. Raises `LaunchError`."""
    found: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        # Every other round goes the other way: what drifts on the machine hits all alike.
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            begun = time.monotonic()
            with Cluster(contender.topology, contender.settings, log_dir / f"{contender.label}-{number}") as cluster:
                tell(f"round {number + 1} of {rounds}: {contender.name} is up after {time.monotonic() - begun:.0f} s")
                found[contender.name].append(run_round(cluster, workload, seed + number))
    return [_result(contender, found[contender.name]) for contender in contenders]


def steadiest(results: Sequence[Result]) -> Result:
    """The better one for whoever reads along, by `STEADIEST`. It must carry the load: with a chunk small enough each
    gap is short, but there are fewer tokens for everybody."""
    most = max(_median(result, "total_tokens_per_second", 0.0) for result in results)
    able = [result for result in results if _median(result, "total_tokens_per_second", 0.0) >= most * CARRIES]
    least = min(_median(result, "inter_token_p99", math.inf) for result in able)
    even = [result for result in able if _median(result, "inter_token_p99", math.inf) <= least * EVEN]
    return max(even, key=lambda result: _median(result, "total_tokens_per_second", 0.0))


def _median(result: Result, key: str, absent: float) -> float:
    return result.figures[key].median if key in result.figures else absent


def run_round(cluster: Cluster, workload: Workload, seed: int) -> Round:
    """Plays `workload` on a cluster that is up, and measures."""
    card = cluster.workers()[0].member.model

    async def play_and_ask() -> tuple[Trial, list[Record]]:
        async with open_session() as session:
            client = CompletionClient(session, cluster.url, card.name, OPTIONS)
            trial = await play(workload, client, Prompts(seed, card.vocab_size), cluster.tree)
            ids = [line.id for line in trial.observed.sent(LONG) if line.id]
            return trial, await fetch_records(session, cluster.url, ids)

    trial, records = asyncio.run(play_and_ask())
    measurement = measure(trial.observed, records, trial.cpu_seconds, trial.others_share, trial.standstills)
    return Round(measurement, typical_handoff(records))


def _result(contender: Contender, rounds: Sequence[Round]) -> Result:
    measured = [one.measurement for one in rounds]
    names = sorted({name for one in measured for name in one.cpu_per_thousand_tokens})
    return Result(
        name=contender.name,
        topology=contender.topology.name,
        settings=list(contender.settings),
        rounds=measured,
        figures=repeated([one.figures for one in measured], [figure.key for figure in FIGURES]),
        cpu_per_thousand_tokens=repeated([one.cpu_per_thousand_tokens for one in measured], names),
        handoff=next((one.handoff for one in rounds if one.handoff is not None), None),
    )


def _ratios(first: Result, second: Result) -> dict[str, float]:
    return {
        key: first.figures[key].median / second.figures[key].median
        for key in first.figures
        if key in second.figures and second.figures[key].median
    }

"""Puts requests on a cluster at their times, and finds the rate that it can carry."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from bench.client import OPTIONS, CompletionClient, Timeline, open_session
from bench.cluster import Cluster
from bench.contenders import Contender
from bench.goodput.arrivals import Arrival, Mix, draw_arrivals
from bench.goodput.outcome import Objective, Outcome, judge
from bench.goodput.search import RateSearch
from bench.processes import Others
from bench.standstill import Witness
from bench.workload import Prompts

DRAIN_SECONDS = 15.0
"""Requests that are not answered so long after the last one came are given up: they are late anyway."""
WARM_UP_SECONDS = 4.0
LEAST_REQUESTS = 15
"""Fewer say nothing about nine tenths of them: low rates last longer."""


class Conditions(msgspec.Struct, frozen=True):
    """What is equal for all contenders."""

    mix: Mix
    objective: Objective
    seconds: float
    """For which requests come, at each rate."""
    seed: int


class Curve(msgspec.Struct, frozen=True):
    """One contender's outcomes by rising rate, and the highest rate that met the objective (0: none did): by
    `Outcome.fair_share`."""

    name: str
    topology: str
    settings: list[str]
    outcomes: list[Outcome]
    goodput: float

    def raw_goodput(self, objective: Objective) -> float:
        """The highest of the rates that were tried which met it by the clients' own clocks."""
        return max((one.rate for one in self.outcomes if one.good_share >= objective.share), default=0.0)


def find_goodput(
    contender: Contender,
    conditions: Conditions,
    search: RateSearch,
    further: Iterable[float],
    log_dir: Path,
    tell: Callable[[str], None],
) -> Curve:
    """Searches on one running cluster, then tries the `further` rates too. Raises `LaunchError`."""
    outcomes: dict[float, Outcome] = {}
    with Cluster(contender.topology, contender.settings, log_dir / contender.label) as cluster:
        trials = Trials(cluster, conditions)
        trials.warm_up()
        while (rate := search.next_rate) is not None:
            outcomes[rate] = trials.run(rate, conditions.seconds)
            search.note(rate, passed=outcomes[rate].fair_share >= conditions.objective.share)
            tell(_line(contender, outcomes[rate]))
        for rate in further:
            if rate > 0 and rate not in outcomes:
                outcomes[rate] = trials.run(rate, conditions.seconds)
                tell(_line(contender, outcomes[rate]))
    ordered = [outcomes[rate] for rate in sorted(outcomes)]
    return Curve(contender.name, contender.topology.name, list(contender.settings), ordered, search.found)


def best_of(
    contenders: Sequence[Contender],
    conditions: Conditions,
    rate: float,
    seconds: float,
    log_dir: Path,
    tell: Callable[[str], None],
) -> tuple[Contender, list[Curve]]:
    """Tries each at one rate: the one with the most good requests (of equals, the faster first tokens), and all
    trials. Raises `LaunchError`."""
    curves = []
    for contender in contenders:
        with Cluster(contender.topology, contender.settings, log_dir / contender.label) as cluster:
            trials = Trials(cluster, conditions)
            trials.warm_up()
            outcome = trials.run(rate, seconds)
        tell(_line(contender, outcome))
        curves.append(Curve(contender.name, contender.topology.name, list(contender.settings), [outcome], 0.0))
    return contenders[rank(curves)], curves


def rank(curves: Sequence[Curve]) -> int:
    """The index of the best of them, by its first outcome."""

    def order(index: int) -> tuple[float, float]:
        outcome = curves[index].outcomes[0]
        return outcome.fair_share, -(outcome.ttft_p90_seconds or 0.0)

    return max(range(len(curves)), key=order)


class Trials:
    """One rate after the other on a cluster that is up."""

    def __init__(self, cluster: Cluster, conditions: Conditions) -> None:
        self._cluster = cluster
        self._conditions = conditions
        self._card = cluster.workers()[0].member.model
        self._number = 0

    def warm_up(self) -> None:
        """What happens for the first time happens here."""
        self.run(1.0, WARM_UP_SECONDS, least=2)

    def run(self, rate: float, seconds: float, least: int = LEAST_REQUESTS) -> Outcome:
        """Begins and ends with an idle cluster. Raises `LaunchError`."""
        conditions = self._conditions
        arrivals = draw_arrivals(conditions.mix, rate, seconds, conditions.seed, least)
        # Each trial has prompts of its own, the same for all contenders: no cache remembers the trial before.
        prompts = Prompts(conditions.seed, self._card.vocab_size)
        stream = f"goodput-{self._number}"
        self._number += 1
        asked = [prompts.prompt(stream, number, each.prompt_tokens) for number, each in enumerate(arrivals)]
        others = Others(self._cluster.tree, os.sched_getaffinity(0))
        with Witness() as witness:
            timelines = asyncio.run(self._play(arrivals, asked))
            ended_at = time.monotonic()
        outcome = judge(rate, timelines, ended_at, conditions.objective, others.share(), witness.standstills)
        self._cluster.wait_idle()
        return outcome

    async def _play(self, arrivals: Sequence[Arrival], prompts: Sequence[list[int]]) -> list[Timeline]:
        timelines = []
        tasks = []
        async with open_session() as session:
            client = CompletionClient(session, self._cluster.url, self._card.name, OPTIONS)
            begun = time.monotonic()
            for arrival, prompt in zip(arrivals, prompts, strict=True):
                await asyncio.sleep(begun + arrival.at - time.monotonic())
                timeline = Timeline(stream="poisson", prompt_tokens=len(prompt), sent_at=time.monotonic())
                timelines.append(timeline)
                tasks.append(asyncio.create_task(client.stream(timeline, prompt, arrival.output_tokens)))
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=DRAIN_SECONDS)
                for task in late:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return timelines


def _line(contender: Contender, outcome: Outcome) -> str:
    return f"{contender.name} at {outcome.rate:.2f}/s: {outcome.fair_share:.0%} of {outcome.requests} requests good"

"""Two clusters under the same load on the same cores, taking turns: what disaggregation gives, and what it costs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec

from bench.client import CompletionClient
from bench.cluster import Cluster
from bench.load import LONG, LoadGenerator, Observed
from bench.measure import FIGURES, HandoffShape, Measurement, measure, typical_handoff
from bench.memcpy import Copied, measure_memcpy
from bench.processes import busy_seconds, own_seconds
from bench.records import Record, fetch_records
from bench.statistics import Repeated
from bench.workload import Prompts, Workload

OPTIONS: Mapping[str, Any] = {"ignore_eos": True, "temperature": 0, "return_token_ids": True}
"""Of each request: random prompts must not end early, and chunks tell how many tokens they carry."""

OTHERS = "others"


class Contender(NamedTuple):
    """A cluster that takes part."""

    name: str
    topology: Path
    settings: Sequence[str] = ()


class Result(msgspec.Struct, frozen=True):
    """One contender's rounds, and the median, least and most of each figure over them."""

    name: str
    topology: str
    rounds: list[Measurement]
    figures: dict[str, Repeated]
    cpu_per_thousand_tokens: dict[str, Repeated]


class Comparison(msgspec.Struct, frozen=True):
    """`ratios` are first contender / second, of medians; `memcpy` is of as many bytes as the first one's handoffs."""

    results: list[Result]
    ratios: dict[str, float]
    memcpy: Copied | None


class Round(NamedTuple):
    measurement: Measurement
    handoff: HandoffShape | None


def compare(
    contenders: tuple[Contender, Contender],
    workload: Workload,
    rounds: int,
    seed: int,
    log_dir: Path,
    tell: Callable[[str], None],
) -> Comparison:
    """Starts, measures and stops the contenders in turns, `rounds` times; never both at once. Raises `LaunchError`."""
    found: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        # Every other round begins with the other one: what drifts on the machine hits both alike.
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            begun = time.monotonic()
            cluster = Cluster(contender.topology, contender.settings, log_dir / f"{contender.name}-{number}")
            with cluster:
                tell(f"round {number + 1} of {rounds}: {contender.name} is up after {time.monotonic() - begun:.0f} s")
                found[contender.name].append(run_round(cluster, workload, seed + number))
    shapes = [one.handoff for one in found[contenders[0].name] if one.handoff is not None]
    results = [_result(contender, [one.measurement for one in found[contender.name]]) for contender in contenders]
    memcpy = measure_memcpy(*shapes[0]) if shapes else None
    return Comparison(results, _ratios(*results), memcpy)


def run_round(cluster: Cluster, workload: Workload, seed: int) -> Round:
    """Plays `workload` on a cluster that is up, and measures."""
    card = cluster.workers()[0].member.model
    tree = cluster.tree
    cores = os.sched_getaffinity(0)
    edges: dict[str, dict[str, float]] = {}

    def mark(edge: str) -> None:
        members = tree.cpu_seconds()
        ours = sum(members.values()) + own_seconds()
        edges[edge] = members | {OTHERS: busy_seconds(cores) - ours}

    async def play() -> tuple[Observed, list[Record]]:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=120)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            client = CompletionClient(session, cluster.url, card.name, OPTIONS)
            observed = await LoadGenerator(workload, client, Prompts(seed, card.vocab_size)).run(mark)
            ids = [line.id for line in observed.sent(LONG) if line.id]
            return observed, await fetch_records(session, cluster.url, ids)

    observed, records = asyncio.run(play())
    spent = {name: seconds - edges["start"].get(name, 0.0) for name, seconds in edges["end"].items()}
    others = spent.pop(OTHERS) / (observed.seconds * len(cores))
    return Round(measure(observed, records, spent, others), typical_handoff(records))


def _result(contender: Contender, rounds: list[Measurement]) -> Result:
    names = sorted({name for one in rounds for name in one.cpu_per_thousand_tokens})
    return Result(
        name=contender.name,
        topology=contender.topology.name,
        rounds=rounds,
        figures=_repeated([one.figures for one in rounds], [figure.key for figure in FIGURES]),
        cpu_per_thousand_tokens=_repeated([one.cpu_per_thousand_tokens for one in rounds], names),
    )


def _repeated(rounds: Sequence[Mapping[str, float]], keys: Sequence[str]) -> dict[str, Repeated]:
    found = {key: Repeated.of([one[key] for one in rounds if key in one]) for key in keys}
    return {key: repeated for key, repeated in found.items() if repeated is not None}


def _ratios(first: Result, second: Result) -> dict[str, float]:
    return {
        key: first.figures[key].median / second.figures[key].median
        for key in first.figures
        if key in second.figures and second.figures[key].median
    }

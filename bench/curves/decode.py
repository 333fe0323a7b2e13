"""Drives one decode worker alone: it prefills for itself, and only the time in which all of a batch decodes counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from bench.alone import Alone, Asked, Place, cores_of
from bench.curves.curve import DecodeCurve, DecodePoint
from bench.curves.together import while_all_decode
from bench.machine import describe_setting
from bench.statistics import Repeated
from bench.workload import Prompts
from cluster.config import Topology
from cluster.errors import ConfigError
from cluster.topology import dump_topology

ALONE = ("prefill.replicas=0", "decode.replicas=1")

OUTPUT_TOKENS = 48
"""Of each sequence: enough gaps for a median, few enough to leave the context nearly what it is called."""


class DecodeGrid(msgspec.Struct, frozen=True):
    batches: Sequence[int]
    context_tokens: Sequence[int]

    def cells(self, context_length: int) -> Iterator[tuple[int, int]]:
        """(batch, context), as far as the output fits too. Contexts rise, so that each is the prefix of the next and
        only the difference has to be prefilled; within one, batches fall, so that it is prefilled once."""
        for context in sorted(self.context_tokens):
            for batch in sorted(self.batches, reverse=True):
                if context + OUTPUT_TOKENS <= context_length:
                    yield batch, context

    @property
    def pool_tokens(self) -> int:
        """Room for the largest cell, twice: while one run's pages are given back, the next one needs its own."""
        return 2 * max(self.batches) * (max(self.context_tokens) + OUTPUT_TOKENS)


def profile_decode(place: Place, grid: DecodeGrid, repeats: int, seed: int, tell: Callable[[str], None]) -> DecodeCurve:
    """Raises `ConfigError`, `LaunchError`."""
    place, topology = _resolve(place, grid)
    with place.open() as cluster:
        alone = Alone(cluster)
        prompts = Prompts(seed, alone.vocab_size)
        points = []
        for batch, context in grid.cells(alone.context_length):
            # Sequence i has the same beginning in every cell: what was prefilled once comes from the prefix cache.
            requests = [Asked(prompts.prompt("decode", i, context), OUTPUT_TOKENS) for i in range(batch)]
            points.append(_point(alone, requests, repeats))
            tell(_line(points[-1]))
    return DecodeCurve(
        setting=describe_setting(),
        topology=dump_topology(topology),
        model=alone.model,
        cores=cores_of(topology.decode.cpus),
        repeats=repeats,
        seed=seed,
        points=points,
    )


def _resolve(place: Place, grid: DecodeGrid) -> tuple[Place, Topology]:
    """With a pool and a batch that are large enough. Raises `ConfigError`."""
    place = place._replace(settings=(*place.settings, *ALONE))
    topology = place.resolve()
    if topology.decode.max_running < max(grid.batches):
        raise ConfigError(f"--batches {max(grid.batches)}: decode.max_running is {topology.decode.max_running}")
    pool = max(topology.pool_pages * topology.kv.page_size, grid.pool_tokens)
    place = place._replace(settings=(*place.settings, f"kv.pool_tokens={pool}"))
    return place, place.resolve()


def _point(alone: Alone, requests: Sequence[Asked], repeats: int) -> DecodePoint:
    found = []
    # The first run prefills what is new, and warms up.
    for run in range(repeats + 1):
        together = while_all_decode(alone.ask(requests))
        if run > 0 and together is not None:
            found.append(together)
    gaps = Repeated.of([each.gap_seconds for each in found])
    if gaps is None:
        raise ConfigError(f"{len(requests)} sequences never decoded all at once: is the pool too small for them?")
    context = round(sum(each.context_tokens for each in found) / len(found))
    return DecodePoint(len(requests), len(requests[0].prompt), context, gaps)


def _line(point: DecodePoint) -> str:
    milliseconds = point.inter_token_seconds.median * 1e3
    rate = point.batch / point.inter_token_seconds.median
    return f"{point.batch} sequences behind {point.context_tokens} tokens: {milliseconds:.1f} ms, {rate:.0f} tok/s"

"""One seed, from its cluster to its end."""

from __future__ import annotations

import gc
import logging
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any, NamedTuple

from tests.sim import model, platform
from tests.sim.cluster import Shape, SimCluster
from tests.sim.faults import CELLS, Cell, Director, aims
from tests.sim.kernel import Violation
from tests.sim.story import Story

LOOK_SECONDS = 0.25
BOUND_SECONDS = 60.0
"""After the last fault is over, everything has to end within so long."""
SEEDS_BETWEEN_COLLECTIONS = 25
STRIDE = 7919
"""A prime: seeds that follow each other aim at cells far from each other, and each cell gets its turn."""
AHEAD = 0.25
"""Of all clusters, how many decode ahead."""


class Outcome(NamedTuple):
    """What came of a seed."""

    seed: int
    failure: str
    """Empty if every invariant held."""
    story: list[str]
    coverage: Counter[Cell]
    seconds: float
    """Of simulated time."""
    events: int


@contextmanager
def simulated_world() -> Iterator[platform.Silence]:
    """Inside, `simulate` works: the real code dials simulated links and computes by the simulated model. Gives what
    takes the place of the router's metrics."""
    with ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)
        # A fifth of the time would go into looking for cycles: `simulate` does it now and then.
        gc.freeze()
        gc.disable()
        stack.callback(gc.enable)
        stack.callback(gc.unfreeze)
        stack.enter_context(model.installed())
        stack.enter_context(platform.installed())
        yield platform.Silence()


def run_seeds(seeds: range) -> list[Outcome]:
    """Their outcomes, without stories."""
    with simulated_world() as metrics:
        return [simulate(seed, metrics) for seed in seeds]


def simulate(seed: int, metrics: Any, *, told: bool = False, cells: Sequence[Cell] = CELLS) -> Outcome:
    """Runs one seed to its end, or to its first violation. The seed decides which of `cells` its first fault aims at;
    its story is in the outcome if it is to be told."""
    if seed % SEEDS_BETWEEN_COLLECTIONS == 0:
        gc.collect()
    story = Story(told=told)
    random = Random(f"shape {seed}")
    aim = cells[seed * STRIDE % len(cells)]
    shape = Shape.of(random, aim.journey, ahead=Random(f"ahead {seed}").random() < AHEAD)
    cluster = SimCluster(seed, shape, metrics, story)
    director = Director(cluster, random, aims(random, aim))
    failure = ""
    with cluster.loop.installed(), story.following_machines():
        try:
            cluster.start()
            story.note(f"seed {seed}: {shape}")
            with director.watching():
                _run(cluster, director)
        except Exception as error:  # noqa: BLE001 - whatever ends a simulation early is what it was made to find
            failure = f"{type(error).__name__}: {error}"
            story.note(f"VIOLATION {failure}")
            story.trace(traceback.format_exc())
    return Outcome(seed, failure, story.lines, director.coverage, cluster.loop.now() - 1000.0, cluster.loop.events)


def _run(cluster: SimCluster, director: Director) -> None:
    loop = cluster.loop
    loop.run(loop.now() + cluster.shape.spread_seconds)
    director.quiet_from = loop.now()
    while open_things := cluster.unsettled():
        if loop.now() > director.quiet_from + BOUND_SECONDS:
            raise Violation(f"{BOUND_SECONDS:g} s after the last fault: {'; '.join(open_things)}")
        loop.run(loop.now() + LOOK_SECONDS)
    cluster.require_rest()

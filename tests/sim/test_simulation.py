"""Hundreds of simulated clusters with faults at each state of a request's journey; `make test-sim` runs thousands."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sim.faults import CELLS, Fault
from tests.sim.mutations import MUTATIONS
from tests.sim.simulation import simulate, simulated_world

SEEDS = 300
SEED_WITH_A_STORY = 1
MUTATED_SEEDS = 150
"""Within so many a planted bug has to show."""


@pytest.fixture(scope="module")
def metrics():
    with simulated_world() as silence:
        yield silence


def test_every_request_ends_once_with_its_tokens_whatever_happens(metrics):
    coverage = Counter()
    for seed in range(SEEDS):
        outcome = simulate(seed, metrics)
        assert not outcome.failure, (
            f'seed {seed}: {outcome.failure}; make test-sim ARGS="--seed {seed}" tells its story'
        )
        coverage += outcome.coverage
    assert {cell.fault for cell in coverage} == set(Fault), "each kind of fault has struck"
    assert {cell.journey for cell in coverage} >= {cell.journey for cell in CELLS}, "in each state of the journey"


def test_a_seed_is_the_same_history_each_time_and_tells_it(metrics):
    first, second = (simulate(SEED_WITH_A_STORY, metrics, told=True) for _ in range(2))
    assert first.story == second.story
    assert any("FAULT" in line for line in first.story)
    assert any("Attempt(" in line for line in first.story)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_noticed(metrics, name):
    mutation = MUTATIONS[name]
    cells = [cell for cell in CELLS if cell.fault in mutation.faults]
    with mutation.plant():
        assert any(simulate(seed, metrics, cells=cells).failure for seed in range(MUTATED_SEEDS))

"""`python -m tests.sim`: many seeds, or one with its story. `make test-sim ARGS="--seed 1234"` tells why 1234 fails."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter

from tests.sim.faults import CELLS, Cell, Fault
from tests.sim.simulation import Outcome, run_seeds, simulate, simulated_world

SEEDS = 10_000
SEEDS_AT_ONCE = 50
FAILURES_SHOWN = 10
MISSED_SHOWN = 40


def tell(seed: int) -> int:
    """Prints the story of one seed."""
    with simulated_world() as metrics:
        outcome = simulate(seed, metrics, told=True)
    print("\n".join(outcome.story))
    print(f"\nseed {seed}: {outcome.failure or 'every invariant held'}")
    return 1 if outcome.failure else 0


def run_all(first: int, count: int, jobs: int) -> int:
    """Prints what failed, and how often each kind of fault struck; 1 if anything is amiss."""
    began = time.monotonic()
    end = first + count
    chunks = [range(seed, min(seed + SEEDS_AT_ONCE, end)) for seed in range(first, end, SEEDS_AT_ONCE)]
    coverage: Counter[Cell] = Counter()
    failed: list[Outcome] = []
    done = 0
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for outcomes in pool.imap_unordered(run_seeds, chunks):
            for outcome in outcomes:
                coverage += outcome.coverage
                if outcome.failure:
                    failed.append(outcome)
            done += len(outcomes)
            if done % 1000 < SEEDS_AT_ONCE:
                print(f"{done} seeds, {time.monotonic() - began:.0f} s, {len(failed)} failed", flush=True)
    for outcome in sorted(failed)[:FAILURES_SHOWN]:
        print(f"seed {outcome.seed}: {outcome.failure}")
    missed = report(coverage)
    print(f"{count} seeds in {time.monotonic() - began:.0f} s: {len(failed)} failed, {len(missed)} cells were not hit")
    if failed:
        print(f'the story of a seed: make test-sim ARGS="--seed {min(failed).seed}"')
    return 1 if failed or (missed and count >= SEEDS) else 0


def report(coverage: Counter[Cell]) -> list[Cell]:
    """Prints a line for each kind of fault; returns the cells that no fault has hit."""
    missed = [cell for cell in CELLS if not coverage[cell]]
    for fault in Fault:
        cells = [cell for cell in CELLS if cell.fault is fault]
        strikes = [coverage[cell] for cell in cells]
        hit = sum(count > 0 for count in strikes)
        print(f"{fault.value:50} {sum(strikes):6} times, in {hit} of {len(cells)} states, at least {min(strikes)} each")
    for cell in missed[:MISSED_SHOWN]:
        print(f"never: {cell.fault.value}, at {cell.journey}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one alone, and tell its story")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many (default: {SEEDS})")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        return tell(arguments.seed)
    return run_all(arguments.first, arguments.seeds, arguments.jobs)


if __name__ == "__main__":
    sys.exit(main())

"""The highest rate that a cluster can carry."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.options import Cores, Out, Overrides, Seed, numbers, stay_on
from bench.commands.plotting import plot_beside
from bench.commands.terminal import console, publish
from bench.contenders import RESULTS, chunked, flexible, split, unified_shapes
from bench.goodput.arrivals import Mix
from bench.goodput.outcome import Objective
from bench.goodput.report import GoodputReport
from bench.goodput.search import RateSearch
from bench.goodput.trial import Conditions, best_of, find_goodput
from bench.machine import describe_setting

TRIAL_SECONDS = 20.0


def goodput_command(
    seconds: Annotated[float, typer.Option(min=1.0, help="For which requests come, at each rate.")] = 30.0,
    start: Annotated[float, typer.Option(min=0.05, help="First rate, in requests a second.")] = 0.75,
    factor: Annotated[float, typer.Option(min=1.05, help="Between two rates on the way up.")] = 1.5,
    halvings: Annotated[int, typer.Option(min=0, help="Steps of bisection after it.")] = 3,
    chunks: Annotated[str, typer.Option(help="Chunk sizes that unified clusters try first.")] = "64,128",
    trial_rate: Annotated[float, typer.Option(min=0.05, help="At which they try them.")] = 1.0,
    seed: Seed = 0,
    settings: Overrides = None,
    cores: Cores = "0,1",
    out: Out = RESULTS,
) -> None:
    """Finds the highest Poisson rate at which 90% of requests have TTFT ≤ 4 s and every gap ≤ 80 ms: for one prefill
    and one decode worker, the same where prompts may be prefilled where they decode, and the best unified cluster."""
    stay_on(cores)
    sizes = numbers(chunks, "--chunks")
    conditions = Conditions(Mix(), Objective(), seconds, seed)
    console.print(f"{conditions.objective.description}; {conditions.mix.description}")
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        logs = Path(folder)
        candidates = [chunked(shape, size) for shape in unified_shapes(settings or ()) for size in sizes]
        trial_seconds = min(TRIAL_SECONDS, seconds)
        best, tried = best_of(candidates, conditions, trial_rate, trial_seconds, logs / "trials", console.print)
        plain = split(settings or ())
        curves = [
            find_goodput(each, conditions, RateSearch(start, factor, halvings), (), logs, console.print)
            for each in (plain, flexible(plain))
        ]
        # What unified does at the rate that a split cluster just carries is what the picture is about.
        carried = max(curve.goodput for curve in curves)
        curves.append(
            find_goodput(best, conditions, RateSearch(start, factor, halvings), (carried,), logs, console.print)
        )
    plot_beside(publish(GoodputReport(describe_setting(), conditions, curves, tried), out))

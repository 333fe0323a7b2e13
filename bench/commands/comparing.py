"""Clusters side by side under one load."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.options import Cores, Out, Overrides, Seconds, Seed, WorkloadName, chosen_workload, numbers, stay_on
from bench.commands.terminal import console, publish
from bench.compare import compare
from bench.compare_report import CompareReport
from bench.contenders import CHUNK_TOKENS, RESULTS, SPLIT, named, unified_shapes
from bench.machine import describe_setting
from bench.tuning import tune


def compare_command(
    workload: WorkloadName = "mixed",
    rounds: Annotated[int, typer.Option(min=1, help="How often each cluster is started and measured.")] = 3,
    seconds: Seconds = None,
    seed: Seed = 0,
    first: Annotated[Path, typer.Option(help="Topology of the first cluster.")] = SPLIT,
    second: Annotated[
        Path | None,
        typer.Option(help="Topology of the second, as it is. Default: unified.yaml, as one worker and as two, tuned."),
    ] = None,
    chunks: Annotated[str, typer.Option(help="Chunk sizes that unified clusters try first.")] = ",".join(
        map(str, CHUNK_TOKENS)
    ),
    settings: Overrides = None,
    cores: Cores = "0,1",
    out: Out = RESULTS,
) -> None:
    """Runs clusters in turns under the same load, on the same cores, and prints what each gave."""
    stay_on(cores)
    chosen = chosen_workload(workload, seconds)
    sizes = numbers(chunks, "--chunks")
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        logs = Path(folder)
        tuned = [
            tune(shape, sizes, chosen, seed, logs / "tuning", console.print)
            for shape in (unified_shapes(settings or ()) if second is None else [])
        ]
        others = [contender for contender, _ in tuned] if second is None else [named(second, settings or ())]
        contenders = [named(first, settings or ()), *others]
        console.print(f"{chosen.description}; {rounds} rounds of " + ", ".join(each.name for each in contenders))
        found = compare(contenders, chosen, rounds, seed, logs, console.print)
    publish(CompareReport(describe_setting(), chosen, seed, found, [trials for _, trials in tuned]), out)

"""One worker alone, over a grid of sizes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench.alone import Place
from bench.commands.options import Cores, Out, Overrides, Seed, numbers, stay_on
from bench.commands.plotting import plot_beside
from bench.commands.terminal import console, publish
from bench.contenders import RESULTS, SPLIT
from bench.curves.decode import DecodeGrid, profile_decode
from bench.curves.prefill import PrefillGrid, profile_prefill

TopologyFile = Annotated[Path, typer.Option(help="The worker is one of this cluster's pool.")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs of each point, after one to warm up.")]


def profile_prefill_command(
    lengths: Annotated[str, typer.Option(help="Prompt tokens to compute.")] = "16,64,128,256,512,1024,1500,2048,4096",
    cached: Annotated[str, typer.Option(help="Tokens before them that are cached already.")] = "0,1024",
    prompts: Annotated[str, typer.Option(help="Prompts at once.")] = "1,4",
    repeats: Repeats = 5,
    topology: TopologyFile = SPLIT,
    seed: Seed = 0,
    settings: Overrides = None,
    cores: Cores = "0,1",
    out: Out = RESULTS,
) -> None:
    """Measures a prefill worker alone: seconds to the first token over prompt lengths, as JSON for a planner."""
    stay_on(cores)
    grid = PrefillGrid(
        numbers(lengths, "--lengths"), numbers(cached, "--cached", least=0), numbers(prompts, "--prompts")
    )
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        place = Place(topology, tuple(settings or ()), Path(folder))
        curve = profile_prefill(place, grid, repeats, seed, console.print)
    plot_beside(publish(curve, out))


def profile_decode_command(
    batches: Annotated[str, typer.Option(help="Sequences that decode together.")] = "1,2,4,8,16,32",
    contexts: Annotated[str, typer.Option(help="Tokens before what they decode.")] = "16,256,1024,2048",
    repeats: Repeats = 3,
    topology: TopologyFile = SPLIT,
    seed: Seed = 0,
    settings: Overrides = None,
    cores: Cores = "0,1",
    out: Out = RESULTS,
) -> None:
    """Measures a decode worker alone: seconds between tokens over batch and context, as JSON for a planner."""
    stay_on(cores)
    grid = DecodeGrid(numbers(batches, "--batches"), numbers(contexts, "--contexts"))
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        place = Place(topology, tuple(settings or ()), Path(folder))
        curve = profile_decode(place, grid, repeats, seed, console.print)
    plot_beside(publish(curve, out))

"""What a GPU is used for."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.options import Out, Seed, numbers
from bench.commands.terminal import console, publish
from bench.contenders import RESULTS
from bench.gpu.measure import Scale, find_model, measure_model
from bench.gpu.report import GpuReport
from bench.gpu.shapes import SHAPES
from bench.machine import describe_setting
from cluster.model_files import DEMO_MODEL

MODELS = ",".join([*SHAPES, DEMO_MODEL])


def gpu_command(
    models: Annotated[
        str, typer.Option(help=f"Shapes with random weights ({', '.join(SHAPES)}), or models by path.")
    ] = MODELS,
    batches: Annotated[str, typer.Option(help="Sequences that decode together.")] = "1,16,64",
    prompts: Annotated[str, typer.Option(help="Lengths of prompts that are prefilled.")] = "2048,8192,32768",
    handoff: Annotated[bool, typer.Option(help="Measure handoffs between two workers on the GPU, too.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Handoffs that are counted.")] = 10,
    seed: Seed = 0,
    out: Out = RESULTS,
) -> None:
    """Measures steps on a GPU beside what bounds them, and the handoff between two workers that share it. Without a
    GPU it fails."""
    scale = Scale(tuple(numbers(batches, "--batches")), tuple(numbers(prompts, "--prompts")))
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        place = Path(folder)
        measured = [
            measure_model(find_model(name, place), scale, repeats, seed, place / "logs", console.print, handoff=handoff)
            for name in models.split(",")
        ]
    publish(GpuReport(describe_setting(), seed, measured), out)

"""What a cluster costs that has nothing to do."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.options import Cores, Out, Overrides, stay_on
from bench.commands.terminal import console, publish
from bench.contenders import RESULTS, SPLIT
from bench.idle import IdleReport, measure_idle
from bench.machine import describe_setting
from cluster.config import TransferName


def idle_command(
    seconds: Annotated[float, typer.Option(min=1.0, help="How long each cluster is looked at.")] = 20.0,
    topology: Annotated[Path, typer.Option(help="Of the clusters.")] = SPLIT,
    settings: Overrides = None,
    cores: Cores = "0,1",
    out: Out = RESULTS,
) -> None:
    """Measures the CPU that an idle cluster uses, with each transfer engine."""
    stay_on(cores)
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        clusters = [
            measure_idle(topology, transfer.value, settings or (), seconds, Path(folder), console.print)
            for transfer in TransferName
        ]
    publish(IdleReport(describe_setting(), topology.stem, seconds, clusters), out)

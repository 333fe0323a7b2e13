"""How many workers a bootstrap and a router can look after."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.options import Cores, Out, numbers, stay_on
from bench.commands.terminal import console, publish
from bench.contenders import RESULTS
from bench.control_plane.measure import measure
from bench.control_plane.report import ControlPlaneReport
from bench.machine import describe_setting
from cluster.config import Bootstrap


def control_plane_command(
    workers: Annotated[str, typer.Option(help="Sizes of the cluster, with commas.")] = "50,200,500",
    seconds: Annotated[float, typer.Option(min=1.0, help="How long each idle cluster is looked at.")] = 20.0,
    losses: Annotated[int, typer.Option(min=1, help="Workers that are lost, each way.")] = 5,
    requests: Annotated[int, typer.Option(min=1, help="Requests, one after the other for each of 8 clients.")] = 1000,
    cores: Cores = "0,1",
    out: Out = RESULTS,
) -> None:
    """Measures bootstrap and a router with many simulated workers: CPU, memory, placement, and how soon a lost worker
    is noticed."""
    stay_on(cores)
    sizes = numbers(workers, "--workers", least=2)
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        measured = [
            asyncio.run(measure(size, seconds, min(losses, size), requests, Path(folder), console.print))
            for size in sizes
        ]
    defaults = Bootstrap()
    report = ControlPlaneReport(
        describe_setting(), defaults.heartbeat_seconds, defaults.lease_seconds, seconds, measured
    )
    publish(report, out)

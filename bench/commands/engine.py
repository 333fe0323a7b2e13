"""The engine alone."""

from __future__ import annotations

from typing import Annotated

import typer

from bench.commands.options import Cores, Out, numbers, stay_on
from bench.commands.terminal import console, publish
from bench.contenders import RESULTS
from bench.engine_speed import EngineReport, measure_engines
from bench.machine import describe_setting


def engine_command(
    dtypes: Annotated[str, typer.Option(help="Of weights, activations and KV.")] = "bfloat16,float32",
    threads: Annotated[str, typer.Option(help="Numbers of compute threads.")] = "1,2",
    kernels: Annotated[str, typer.Option(help="auto, native or torch.")] = "auto",
    cores: Cores = "0,1",
    out: Out = RESULTS,
) -> None:
    """Measures the engine without servers, beside the machine's peaks of products and of reading."""
    stay_on(cores)
    speeds = measure_engines(dtypes.split(","), numbers(threads, "--threads"), kernels, console.print)
    publish(EngineReport(setting=describe_setting(), speeds=speeds), out)

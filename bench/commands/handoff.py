"""What handing over costs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.options import Cores, Out, Overrides, Seed, stay_on
from bench.commands.terminal import console, publish
from bench.contenders import RESULTS
from bench.handoff.measure import measure_handoff
from bench.handoff.report import HandoffReport
from bench.machine import describe_setting
from bench.memcpy import measure_memcpy
from cluster.config import TransferName


def handoff_command(
    transfer: Annotated[
        list[TransferName] | None, typer.Option("--transfer", help="May be repeated. Default: all.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=17, help="Of each prompt.")] = 1500,
    repeats: Annotated[int, typer.Option(min=1, help="Handoffs that are counted, and bare ones beside them.")] = 15,
    seed: Seed = 0,
    settings: Overrides = None,
    cores: Cores = "0,1",
    out: Out = RESULTS,
) -> None:
    """Measures the handoff of one prompt after the other: its bandwidth beside a bare loop over the same transfer
    engine, and the time that it adds to a request."""
    stay_on(cores)
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        handed = [
            measure_handoff(each, prompt_tokens, repeats, seed, settings or (), Path(folder), console.print)
            for each in transfer or list(TransferName)
        ]
    memcpy = measure_memcpy(handed[0].whole.page_bytes, handed[0].whole.pages)
    publish(HandoffReport(describe_setting(), seed, handed, memcpy), out)

"""`python -m bench`: compare two clusters, load any endpoint, or measure a plain copy."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import msgspec
import typer
from rich.console import Console

from bench.client import CompletionClient
from bench.compare import OPTIONS, Contender, compare
from bench.load import LONG, LoadGenerator, Observed
from bench.machine import describe_setting
from bench.measure import FIGURES, measure
from bench.memcpy import measure_memcpy
from bench.records import Record, fetch_records
from bench.report import Report, show, write
from bench.workload import WORKLOADS, Prompts, Workload
from cluster.errors import BatonError, ConfigError

REPOSITORY = Path(__file__).parent.parent
TOPOLOGIES = REPOSITORY / "deploy" / "topologies"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()

WorkloadName = Annotated[str, typer.Option("--workload", help=f"One of {', '.join(WORKLOADS)}.")]
Seconds = Annotated[float | None, typer.Option(help="Length of the measured window, instead of the workload's.")]
Seed = Annotated[int, typer.Option(help="Prompts are made from it.")]


@app.command("compare")
def compare_command(
    workload: WorkloadName = "mixed",
    rounds: Annotated[int, typer.Option(min=1, help="How often each cluster is started and measured.")] = 3,
    seconds: Seconds = None,
    seed: Seed = 0,
    first: Annotated[Path, typer.Option(help="Topology of the first cluster.")] = TOPOLOGIES / "demo.yaml",
    second: Annotated[Path, typer.Option(help="Topology of the second cluster.")] = TOPOLOGIES / "unified.yaml",
    settings: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE for both topologies.")] = None,
    cores: Annotated[str, typer.Option(help="Everything runs on these cores.")] = "0,1",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = REPOSITORY / "bench" / "results",
) -> None:
    """Runs two clusters in turns under the same load, on the same cores, and prints what each gave."""
    os.sched_setaffinity(0, _cores(cores))
    chosen = _workload(workload, seconds)
    contenders = (_contender(first, settings), _contender(second, settings))
    console.print(f"{chosen.description}; {rounds} rounds of {contenders[0].name} and {contenders[1].name}")
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as log_dir:
        found = compare(contenders, chosen, rounds, seed, Path(log_dir), console.print)
    report = Report(setting=describe_setting(), workload=chosen, seed=seed, comparison=found)
    show(report, console)
    for path in write(report, out):
        console.print(f"written: {path}")


@app.command("load")
def load_command(
    url: Annotated[str, typer.Option(help="Of the endpoint, without /v1.")],
    model: Annotated[str, typer.Option(help="Its name there.")] = "smollm2-135m-instruct",
    workload: WorkloadName = "mixed",
    seconds: Seconds = None,
    seed: Seed = 0,
    vocab_size: Annotated[int, typer.Option(help="Prompts are made of token ids below this.")] = 32_000,
    options: Annotated[str, typer.Option(help="JSON object that goes into each request.")] = json.dumps(dict(OPTIONS)),
) -> None:
    """Puts a workload on any OpenAI-compatible endpoint that takes token-id prompts."""
    chosen = _workload(workload, seconds)
    console.print(chosen.description)

    async def play() -> tuple[Observed, list[Record]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
            client = CompletionClient(session, url, model, _json_object(options))
            observed = await LoadGenerator(chosen, client, Prompts(seed, vocab_size)).run()
            ids = [line.id for line in observed.sent(LONG) if line.id]
            return observed, await fetch_records(session, url, ids)

    measurement = measure(*asyncio.run(play()), cpu_seconds={})
    for figure in FIGURES:
        if figure.key in measurement.figures:
            console.print(f"{figure.label:<45} {measurement.figures[figure.key]:>12,.2f} {figure.unit}")
    console.print(f"requests: {measurement.short_requests} short, {measurement.long_requests} long")
    if measurement.errors:
        raise ConfigError(f"{len(measurement.errors)} requests failed, the first with: {measurement.errors[0]}")


@app.command("memcpy")
def memcpy_command(
    page_bytes: Annotated[int, typer.Option(min=1, help="Default: 16 tokens of the demo model in bfloat16.")] = 368_640,
    pages: Annotated[int, typer.Option(min=1)] = 94,
) -> None:
    """Measures a plain copy of scattered pages: the yardstick of a handoff."""
    copied = measure_memcpy(page_bytes, pages)
    console.print(f"{pages} pages of {page_bytes:,} bytes: {copied.gigabytes_per_second:.2f} GB/s")


def main() -> None:
    """Plain words for what is a user's or an environment's fault; 1 is the exit code."""
    try:
        app()
    except BatonError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise SystemExit(1) from error


def _workload(name: str, seconds: float | None) -> Workload:
    if name not in WORKLOADS:
        raise ConfigError(f"--workload {name}: expected one of {', '.join(WORKLOADS)}")
    chosen = WORKLOADS[name]
    return chosen if seconds is None else msgspec.structs.replace(chosen, seconds=seconds)


def _contender(topology: Path, settings: list[str] | None) -> Contender:
    name = {"demo": "1P1D"}.get(topology.stem, topology.stem)
    return Contender(name, topology, tuple(settings or ()))


def _cores(text: str) -> set[int]:
    """Raises `ConfigError` for what is no list of cores of this machine."""
    try:
        wanted = {int(word) for word in text.split(",")}
    except ValueError as error:
        raise ConfigError(f"--cores {text}: expected numbers with commas, as in 0,1") from error
    allowed = os.sched_getaffinity(0)
    if not wanted <= allowed:
        raise ConfigError(f"--cores {text}: this process may use {sorted(allowed)}")
    return wanted


def _json_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--options: expected a JSON object: {error}") from error

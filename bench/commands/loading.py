"""A load on an endpoint that is there already, and a plain copy."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import typer

from bench.client import OPTIONS, CompletionClient, open_session
from bench.commands.options import Seconds, Seed, WorkloadName, chosen_workload, json_object
from bench.commands.terminal import console
from bench.load import LONG, LoadGenerator, Observed
from bench.measure import FIGURES, measure
from bench.memcpy import measure_memcpy
from bench.records import Record, fetch_records
from bench.workload import Prompts
from cluster.errors import ConfigError


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
    chosen = chosen_workload(workload, seconds)
    fields = json_object(options)
    console.print(chosen.description)

    async def play() -> tuple[Observed, list[Record]]:
        async with open_session() as session:
            client = CompletionClient(session, url, model, fields)
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


def memcpy_command(
    page_bytes: Annotated[int, typer.Option(min=1, help="Default: 16 tokens of the demo model in bfloat16.")] = 368_640,
    pages: Annotated[int, typer.Option(min=1)] = 94,
) -> None:
    """Measures a plain copy of scattered pages: the yardstick of a handoff."""
    copied = measure_memcpy(page_bytes, pages)
    console.print(f"{pages} pages of {page_bytes:,} bytes: {copied.gigabytes_per_second:.2f} GB/s")

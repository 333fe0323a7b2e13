"""Options that several commands of `python -m bench` have, and what they mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from bench.workload import WORKLOADS, Workload
from cluster.errors import ConfigError

WorkloadName = Annotated[str, typer.Option("--workload", help=f"One of {', '.join(WORKLOADS)}.")]
Seconds = Annotated[float | None, typer.Option(help="Length of the measured window, instead of the workload's.")]
Seed = Annotated[int, typer.Option(help="Prompts are made from it.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE for all topologies.")]
Cores = Annotated[str, typer.Option(help="Everything runs on these cores.")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]


def stay_on(cores: str) -> None:
    """This process and its children run on these cores only. Raises `ConfigError` for what is no list of cores of this
    machine."""
    os.sched_setaffinity(0, _cores(cores))


def chosen_workload(name: str, seconds: float | None) -> Workload:
    if name not in WORKLOADS:
        raise ConfigError(f"--workload {name}: expected one of {', '.join(WORKLOADS)}")
    chosen = WORKLOADS[name]
    return chosen if seconds is None else msgspec.structs.replace(chosen, seconds=seconds)


def numbers(text: str, option: str, least: int = 1) -> list[int]:
    """Different numbers with commas between them, in rising order. Raises `ConfigError`."""
    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise ConfigError(f"{option} {text}: expected numbers with commas, as in 64,128") from error
    if found[0] < least:
        raise ConfigError(f"{option} {text}: expected no number below {least}")
    return found


def json_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--options: expected a JSON object: {error}") from error


def _cores(text: str) -> set[int]:
    try:
        wanted = {int(word) for word in text.split(",")}
    except ValueError as error:
        raise ConfigError(f"--cores {text}: expected numbers with commas, as in 0,1") from error
    allowed = os.sched_getaffinity(0)
    if not wanted <= allowed:
        raise ConfigError(f"--cores {text}: this process may use {sorted(allowed)}")
    return wanted

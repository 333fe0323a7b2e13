"""Pictures of results that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.terminal import console
from bench.pictures import draw, read
from cluster.errors import ConfigError


def plot_command(
    file: Annotated[Path, typer.Argument(help="JSON of goodput, profile-prefill or profile-decode.")],
    out: Annotated[Path | None, typer.Option(help="The picture, .svg or .png. Default: beside the file, .svg.")] = None,
) -> None:
    """Draws a result."""
    picture = out or file.with_suffix(".svg")
    draw(read(file), picture)
    console.print(f"written: {picture}", soft_wrap=True)


def plot_beside(file: Path) -> None:
    """At the end of a measurement, whose result stands without a picture, too."""
    try:
        plot_command(file)
    except ConfigError as error:
        console.print(f"no picture: {error}", style="yellow", markup=False)

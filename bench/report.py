"""A result for people (tables in the terminal and in Markdown) and for programs (JSON): one style for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table as RichTable

from bench.machine import Setting
from bench.statistics import Repeated

ABSENT = "-"


class Table(NamedTuple):
    """`headers[0]` names the rows; all other columns are figures. Each row is as long as `headers`."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


class Page(NamedTuple):
    """What people read of a result. `stem` begins the names of its files."""

    stem: str
    title: str
    tables: Sequence[Table]
    notes: Sequence[str]


def write(result: object, setting: Setting, page: Page, folder: Path) -> list[Path]:
    """Writes `result` as JSON and `page` as Markdown, both named after day and commit; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{page.stem}-{setting.measured_at[:10]}-{setting.commit.rstrip('+')}"
    data, text = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    text.write_text(markdown(page, setting))
    return [data, text]


def markdown(page: Page, setting: Setting) -> str:
    lines = [
        f"## {page.title}",
        "",
        f"`{setting.command}` at {setting.commit}, {setting.measured_at}",
        "",
        f"Machine: {setting.processor}, cores {_cores(setting)}, {setting.memory_gib:g} GiB, {setting.system}, "
        f"Python {setting.python}; " + ", ".join(f"{name} {found}" for name, found in setting.versions.items()),
        "",
    ]
    for table in page.tables:
        lines += [f"### {table.title}", ""] if len(page.tables) > 1 else []
        lines += [_row(table.headers), _row(["---", *["---:"] * (len(table.headers) - 1)])]
        lines += [*[_row(row) for row in table.rows], ""]
    return "\n".join([*lines, *page.notes]) + "\n"


def show(page: Page, console: Console) -> None:
    for table in page.tables:
        drawn = RichTable(title=table.title or page.title, title_justify="left")
        drawn.add_column(table.headers[0])
        for header in table.headers[1:]:
            drawn.add_column(header, justify="right")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    for note in page.notes:
        console.print(note, style="dim", markup=False, highlight=False)


def spread(repeated: Repeated | None, scale: float = 1.0) -> str:
    """The median, and the extremes where they differ; all times `scale`."""
    if repeated is None:
        return ABSENT
    middle = number(repeated.median * scale)
    if repeated.least == repeated.most:
        return middle
    return f"{middle} ({number(repeated.least * scale)} to {number(repeated.most * scale)})"


def number(value: float | None) -> str:
    """Three significant digits, and no exponent."""
    if value is None:
        return ABSENT
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _cores(setting: Setting) -> str:
    used = ",".join(str(core) for core in setting.cores_used)
    return f"{used} of {setting.cores_of_machine}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"

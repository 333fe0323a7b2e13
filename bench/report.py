"""The result of a comparison for people (a table in the terminal, one in Markdown) and for programs (JSON)."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from bench.compare import Comparison, Result
from bench.machine import Setting
from bench.measure import FIGURES
from bench.statistics import DEFINITION, Repeated
from bench.workload import Workload

ABSENT = "-"


class Report(msgspec.Struct, frozen=True):
    """Everything that is needed to judge, or to repeat, a comparison."""

    setting: Setting
    workload: Workload
    seed: int
    comparison: Comparison
    percentiles: str = DEFINITION


def write(report: Report, folder: Path) -> list[Path]:
    """Writes NAME.json and NAME.md; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    day = report.setting.measured_at[:10]
    stem = f"compare-{report.workload.name}-{day}-{report.setting.commit.rstrip('+')}"
    data, text = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    text.write_text(markdown(report))
    return [data, text]


def markdown(report: Report) -> str:
    setting = report.setting
    headers, *rows = _rows(report.comparison)
    lines = [
        f"## {' against '.join(result.name for result in report.comparison.results)}, {report.workload.description}",
        "",
        f"`{setting.command}` at {setting.commit}, {setting.measured_at}",
        "",
        f"Machine: {setting.processor}, cores {_cores(setting)}, {setting.memory_gib:g} GiB, {setting.system}, "
        f"Python {setting.python}; " + ", ".join(f"{name} {found}" for name, found in setting.versions.items()),
        "",
        _row(headers),
        _row(["---", *["---:"] * (len(headers) - 1)]),
        *[_row(row) for row in rows],
        "",
        *_notes(report),
    ]
    return "\n".join(lines) + "\n"


def show(report: Report, console: Console) -> None:
    headers, *rows = _rows(report.comparison)
    table = Table(title=report.workload.description, title_justify="left")
    table.add_column(headers[0])
    for header in headers[1:]:
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in _notes(report):
        console.print(note, style="dim")


def _rows(comparison: Comparison) -> list[list[str]]:
    """Headers, then one row for each figure that anybody has."""
    results = comparison.results
    rows = [["", "unit", *[result.name for result in results], "ratio", "better"]]
    for figure in FIGURES:
        cells = [_cell(result.figures.get(figure.key)) for result in results]
        if any(cell != ABSENT for cell in cells):
            ratio = comparison.ratios.get(figure.key)
            better = "lower" if figure.lower_is_better else "higher"
            rows.append([figure.label, figure.unit, *cells, ABSENT if ratio is None else f"{ratio:.2f}", better])
    if comparison.memcpy is not None:
        memcpy = comparison.memcpy
        size = memcpy.page_bytes * memcpy.pages / 1e6
        label = f"memcpy of {size:.0f} MB in {memcpy.pages} pages"
        rows.append([label, "GB/s", f"{memcpy.gigabytes_per_second:.2f}", ABSENT, ABSENT, "higher"])
    return rows + _processor_rows(results)


def _processor_rows(results: list[Result]) -> list[list[str]]:
    names = sorted({name for result in results for name in result.cpu_per_thousand_tokens})
    return [
        [f"CPU per 1,000 output tokens, {name}", "s"]
        + [_cell(result.cpu_per_thousand_tokens.get(name)) for result in results]
        + [ABSENT, "lower"]
        for name in names
    ]


def _cell(repeated: Repeated | None) -> str:
    if repeated is None:
        return ABSENT
    middle = _number(repeated.median)
    if repeated.least == repeated.most:
        return middle
    return f"{middle} ({_number(repeated.least)} to {_number(repeated.most)})"


def _number(value: float) -> str:
    """Three significant digits, and no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _notes(report: Report) -> list[str]:
    results = report.comparison.results
    rounds = len(results[0].rounds)
    errors = {result.name: sum(len(one.errors) for one in result.rounds) for result in results}
    shares = [one.others_share for result in results for one in result.rounds if one.others_share is not None]
    disturbed = [f"Other processes used up to {max(shares):.0%} of these cores."] if shares else []
    return [
        *disturbed,
        f"Medians of {rounds} rounds (least to most). The clusters took turns on the same cores, load generator too.",
        "The ratio is first / second. Errors: " + ", ".join(f"{name} {count}" for name, count in errors.items()) + ".",
        f"Percentiles: {report.percentiles}.",
        "Inter-token: between two successive chunks that carry tokens, at the client.",
        "GB are 10^9 bytes; the handoff's time is that with a write under way.",
    ]


def _cores(setting: Setting) -> str:
    used = ",".join(str(core) for core in setting.cores_used)
    return f"{used} of {setting.cores_of_machine}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"

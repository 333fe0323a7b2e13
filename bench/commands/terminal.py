"""Where the commands print, and how they end: every report is shown and written alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol

from rich.console import Console

from bench.machine import Setting
from bench.report import Page, show, write

console = Console(width=None if sys.stdout.isatty() else 120)


class Report(Protocol):
    """A struct that knows where it was measured and what people should read of it."""

    @property
    def setting(self) -> Setting: ...

    @property
    def page(self) -> Page: ...


def publish(report: Report, folder: Path) -> Path:
    """Shows it, writes it, and returns the path of its JSON."""
    page = report.page
    show(page, console)
    data, text = write(report, report.setting, page, folder)
    console.print(f"written: {data}\nwritten: {text}", soft_wrap=True)
    return data

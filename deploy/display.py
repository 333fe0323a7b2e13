"""How a start-up looks: a live table on a terminal, a line for each change anywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.startup import Phase, Progress

_STYLES = {
    Phase.STARTING: "dim",
    Phase.LOADING: "yellow",
    Phase.REGISTERED: "cyan",
    Phase.READY: "green",
}


class Display(Protocol):
    """Called by one session, on its event loop."""

    def show(self, progress: Sequence[Progress]) -> None:
        """Shows how far each process is; called several times a second."""

    def tell(self, line: str) -> None:
        """Says something that has happened."""

    def close(self) -> None:
        """Leaves the last state on the screen. A second call does nothing."""


def make_display(console: Console) -> Display:
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console)


class LiveDisplay:
    """A table that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        # Redrawn by `show` alone: a drawing thread of rich would make each fork of ours one of a threaded process.
        self._live = Live(console=console, auto_refresh=False)
        self._console = console

    def show(self, progress: Sequence[Progress]) -> None:
        if not self._live.is_started:
            self._live.start()
        self._live.update(_table(progress), refresh=True)

    def tell(self, line: str) -> None:
        _tell(self._console, line)

    def close(self) -> None:
        self._live.stop()


class LineDisplay:
    """One line for each change of phase."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, Phase] = {}

    def show(self, progress: Sequence[Progress]) -> None:
        for each in progress:
            if self._shown.get(each.name) is not each.phase:
                self._shown[each.name] = each.phase
                self._console.print(f"{each.seconds:6.1f} s  {each.name:<12} {each.phase.value}", highlight=False)

    def tell(self, line: str) -> None:
        _tell(self._console, line)

    def close(self) -> None:
        pass


def _tell(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(progress: Sequence[Progress]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("process")
    table.add_column("phase")
    table.add_column("time", justify="right")
    table.add_column("last event")
    for each in progress:
        event = "" if each.phase is Phase.READY else each.event
        phase = Text(each.phase.value, _STYLES[each.phase])
        table.add_row(each.name, phase, f"{each.seconds:.1f} s", Text(event, "dim", no_wrap=True, overflow="ellipsis"))
    return table

"""The log files of a cluster's processes: NAME.log in its run directory, wherever the processes are."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import BinaryIO

FOLLOW_SECONDS = 0.2
_TAIL_BYTES = 64 * 1024


def log_file(directory: Path, name: str) -> Path:
    return directory / f"{name}.log"


def tail(file: Path, lines: int) -> list[str]:
    """The last lines, whole or begun; fewer where lines are very long."""
    with file.open("rb") as log:
        *whole, begun = _end_of(log)
    return _last([*whole, begun] if begun else whole, lines)


async def read_log(file: Path, lines: int, *, follow: bool) -> AsyncGenerator[str, None]:
    """The last `lines` lines; with `follow` also those that are written from now on, until it is closed."""
    if not follow:
        for line in tail(file, lines):
            yield line
        return
    with file.open("rb") as log:
        *whole, begun = _end_of(log)
        for line in _last(whole, lines):
            yield line
        while True:
            *whole, begun = (begun + log.read()).split(b"\n")
            for line in _last(whole, len(whole)):
                yield line
            await asyncio.sleep(FOLLOW_SECONDS)


def _end_of(log: BinaryIO) -> list[bytes]:
    """Its last lines; the last of them is not whole, and most often empty."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
    return log.read().split(b"\n")


def _last(lines: Sequence[bytes], count: int) -> list[str]:
    return [line.decode(errors="replace") for line in lines[max(0, len(lines) - count) :]]

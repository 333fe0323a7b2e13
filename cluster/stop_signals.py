"""Signals as something to wait for, one at a time: the first asks, the second insists."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence

POLITE = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """A context manager on the running event loop. Each signal ends one `wait`, also one that comes later."""

    def __init__(self, numbers: Sequence[signal.Signals] = POLITE) -> None:
        self._numbers = numbers
        self._received: asyncio.Queue[None] = asyncio.Queue()

    async def wait(self) -> None:
        await self._received.get()

    def __enter__(self) -> StopSignals:
        for number in self._numbers:
            asyncio.get_running_loop().add_signal_handler(number, self._received.put_nowait, None)
        return self

    def __exit__(self, *exception: object) -> None:
        for number in self._numbers:
            asyncio.get_running_loop().remove_signal_handler(number)

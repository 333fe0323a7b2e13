"""What asyncio lacks in Python 3.10: tasks that live and end together."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def first_of(*tasks: asyncio.Future[None]) -> None:
    """Waits for the first of `tasks` to end, cancels the others, and raises what it raised."""
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel(*tasks)
    for task in done:
        task.result()


async def together(*parts: Coroutine[Any, Any, None]) -> None:
    """Runs all `parts` until each has ended, or one raises: then the others are cancelled, and it is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        await cancel(*tasks)
    for task in done:
        task.result()


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Returns when they are over; what they raise meanwhile is nobody's business."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

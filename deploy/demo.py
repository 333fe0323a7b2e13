"""`baton demo`: one answer, streamed to the terminal, and where its time went."""

from __future__ import annotations

import asyncio

from rich.console import Console

from cluster.errors import LaunchError
from deploy.cluster_client import RequestRecord, RouterClient
from deploy.explain import waterfall

PROMPT = "Explain the water cycle in simple words."
MAX_TOKENS = 160

_RECORD_TRIES = 20
_RECORD_INTERVAL = 0.1


async def run_demo(router: RouterClient, model: str, console: Console) -> None:
    """Asks `PROMPT` and prints the answer as it comes, then the record. Raises `LaunchError`."""
    console.print(f"\n[bold]you[/bold]    {PROMPT}")
    console.print("[bold]model[/bold]  ", end="")
    request = ""
    async for piece in router.chat(model, PROMPT, MAX_TOKENS):
        request = piece.request
        console.print(piece.text, end="", markup=False, highlight=False, soft_wrap=True)
    console.print("\n")
    if not request:
        raise LaunchError("the router's answer was empty")
    record = await _final_record(router, request)
    console.print(f"where the time went (all of it: GET /v1/requests/{record.id})", highlight=False, soft_wrap=True)
    console.print(waterfall(record))


async def _final_record(router: RouterClient, request: str) -> RequestRecord:
    """The record once it is whole: the last words of the workers may arrive after the client's last token."""
    record = await router.record(request)
    for _ in range(_RECORD_TRIES):
        if record.total_seconds is not None:
            break
        await asyncio.sleep(_RECORD_INTERVAL)
        record = await router.record(request)
    return record

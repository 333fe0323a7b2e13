"""`baton demo`: one answer, streamed to the terminal, and where its time went."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from cluster.errors import LaunchError
from deploy.cluster_client import RequestRecord, RouterClient

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
    console.print(timings_table(record))


async def _final_record(router: RouterClient, request: str) -> RequestRecord:
    """The record once it is whole: the last words of the workers may arrive after the client's last token."""
    record = await router.record(request)
    for _ in range(_RECORD_TRIES):
        if record.total_seconds is not None:
            break
        await asyncio.sleep(_RECORD_INTERVAL)
        record = await router.record(request)
    return record


def timings_table(record: RequestRecord) -> Table:
    """Stage by stage; those that the request did not go through are left out."""
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("what")
    for row in _rows(record):
        table.add_row(*row)
    return table


def _rows(record: RequestRecord) -> Iterator[tuple[str, str, str]]:
    prefill = record.prefill or (record.decode.prefill if record.decode else None)
    if record.queue_seconds is not None:
        yield "queue", milliseconds(record.queue_seconds), ""
    if prefill is not None:
        computed = prefill.tokens - prefill.cached_tokens
        text = f"{computed} tokens{_rate(computed, prefill.compute_seconds, 'tok/s')}"
        where = record.prefill_worker or record.decode_worker
        yield "prefill", milliseconds(prefill.compute_seconds), f"{text}, on {where}"
    if record.handoff is not None:
        handoff = record.handoff
        text = f"{handoff.pages} pages, {handoff.bytes / 1e6:.2f} MB"
        rate = _rate(handoff.bytes / 1e9, handoff.write_seconds, "GB/s")
        yield "handoff", milliseconds(handoff.write_seconds), f"{text}{rate}, to {record.decode_worker}"
        yield "  exposed", milliseconds(handoff.exposed_seconds), "last chunk computed until acknowledged"
    if record.first_token_seconds is not None:
        yield "first token", milliseconds(record.first_token_seconds), "as the router sent it"
    gaps = record.inter_token_seconds
    if gaps is not None and gaps.p50 is not None and gaps.p99 is not None:
        yield "inter-token", milliseconds(gaps.p50), f"p50; p99 {milliseconds(gaps.p99)}"
    if record.total_seconds is not None:
        rate = _rate(record.output_tokens, record.total_seconds, "tok/s")
        yield "total", milliseconds(record.total_seconds), f"{record.output_tokens} tokens{rate}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _rate(amount: float, seconds: float, unit: str) -> str:
    """`, 12.3 unit` with three digits or more; nothing for no time at all."""
    if seconds <= 0:
        return ""
    rate = amount / seconds
    return f", {rate:,.0f} {unit}" if rate >= 100 else f", {rate:.3g} {unit}"

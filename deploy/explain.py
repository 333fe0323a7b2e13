"""Where one request's time went, as a waterfall: `baton explain`, and the end of `baton demo`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings
from deploy.cluster_client import AttemptRecord, RequestRecord

BAR_WIDTH = 32
_BAR = "█"
_MARK = "▏"


class Stage(NamedTuple):
    """A row. `start` is since the request's arrival, in seconds; None: it is not known, or it has no one place."""

    name: str
    start: float | None
    seconds: float
    what: str


def waterfall(record: RequestRecord) -> Table:
    """Stage by stage, each bar at its place in time; stages that the request did not go through are left out."""
    found = list(stages(record))
    end = max([record.total_seconds or 0.0, *(row.start + row.seconds for row in found if row.start is not None)])
    table = Table(box=None, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("", width=BAR_WIDTH, no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("what")
    for row in found:
        table.add_row(row.name, _bar(row, end), milliseconds(row.seconds), row.what)
    return table


def stages(record: RequestRecord) -> Iterator[Stage]:
    """In the order in which they began. Nothing here is a difference between two hosts' clocks: see the record."""
    prefill = record.prefill or (record.decode.prefill if record.decode else None)
    first_token = record.first_token_seconds
    if prefill is not None:
        yield from _until_first_token(record, prefill)
    if first_token is not None:
        yield Stage("first token", first_token, 0.0, f"{milliseconds(first_token)} after the request's arrival")
    if record.handoff is not None:
        yield from _handoff(record, record.handoff, prefill)
    if record.decode is not None and first_token is not None:
        yield from _decode(record, record.decode, first_token)
    if record.attempts > 1:
        yield from _attempts(record.history)
    if record.total_seconds is not None:
        rate = _rate(record.output_tokens, record.total_seconds, "tok/s")
        yield Stage("total", 0.0, record.total_seconds, f"{record.output_tokens} tokens{rate}{_ending(record)}")


def _until_first_token(record: RequestRecord, prefill: PrefillTimings) -> Iterator[Stage]:
    """The parts of the first token's time: they sum up to it."""
    where = record.prefill_worker or record.decode_worker
    parts = record.first_token
    begun = None
    if parts is not None:
        what = f"read, tokenized ({milliseconds(parts.tokenize)}), placed"
        yield Stage("router", 0.0, parts.router, what)
        yield Stage("network", parts.router, parts.network, f"to {where} and back")
        yield Stage("queue", parts.router + parts.network, parts.queue, f"on {where}")
        begun = parts.router + parts.network + parts.queue
    computed = prefill.tokens - prefill.cached_tokens
    rate = _rate(computed, prefill.compute_seconds, "tok/s")
    cached = f", {prefill.cached_tokens} cached" if prefill.cached_tokens else ""
    what = f"{computed} tokens in {_count(prefill.chunks, 'chunk')}{cached}{rate}, on {where}"
    yield Stage("prefill", begun, prefill.compute_seconds, what)
    if record.handoff is not None:
        waited = record.decode.lease_seconds if record.decode else 0.0
        what = f"pages of {record.decode_worker}, {milliseconds(waited)} in its queue for them"
        yield Stage("  grant", begun, record.handoff.grant_wait_seconds, what)
    if parts is not None and begun is not None:
        yield Stage("rest", begun + parts.prefill, parts.rest, "the token's own way, beyond that of the first word")


def _handoff(record: RequestRecord, handoff: HandoffTimings, prefill: PrefillTimings | None) -> Iterator[Stage]:
    """The writes, most of which happened behind the prefill, and what came after it."""
    start = record.first_token_seconds
    batches = _count(handoff.batches, "batch", "batches")
    skipped = f"; {handoff.skipped_pages} more were there already" if handoff.skipped_pages else ""
    rate = _rate(handoff.bytes / 1e9, handoff.write_seconds, "GB/s")
    size = f"{handoff.pages} pages, {handoff.bytes / 1e6:.2f} MB in {batches}{rate}, to {record.decode_worker}"
    yield Stage("handoff", None, handoff.write_seconds, size + skipped)
    computing = prefill.compute_seconds if prefill is not None else 0.0
    share = f", {handoff.exposed_seconds / computing:.1%} of prefill" if computing > 0 else ""
    yield Stage("  exposed", start, handoff.exposed_seconds, f"last chunk computed until ACK{share}")
    yield Stage("    pages", start, handoff.tail_seconds, "the last of them written")
    verified = record.decode.verify_seconds if record.decode else 0.0
    messages = max(0.0, handoff.exposed_seconds - handoff.tail_seconds - verified)
    yield Stage("    messages", None, messages, "DONE there, ACK back")
    yield Stage("    verified", None, verified, "digests compared")


def _decode(record: RequestRecord, decode: DecodeTimings, first_token: float) -> Iterator[Stage]:
    second = record.second_token_seconds
    if second is not None and record.handoff is not None:
        joined = first_token + max(0.0, second - decode.first_step_seconds)
        yield Stage("first step", joined, decode.first_step_seconds, "the step under way awaited, then its own")
    if record.total_seconds is None or not decode.steps:
        return
    start = first_token + (second or 0.0)
    gaps, pace = record.inter_token_seconds, ""
    if gaps is not None and gaps.p50 is not None and gaps.p99 is not None:
        pace = f"; gaps {milliseconds(gaps.p50)} p50, {milliseconds(gaps.p99)} p99"
    mean = decode.batch_sum / decode.steps
    what = f"{_count(decode.steps, 'step')}, batch {mean:.1f}, at most {decode.batch_max}{pace}"
    yield Stage("decode", start, max(0.0, record.total_seconds - start), what)


def _attempts(history: Sequence[AttemptRecord]) -> Iterator[Stage]:
    """Where each of them ran, what it gave, and what ended it."""
    for attempt in history:
        where = " and ".join(name for name in (attempt.prefill_worker, attempt.decode_worker) if name)
        ended = attempt.ended_seconds if attempt.ended_seconds is not None else attempt.placed_seconds
        blame = f" by {attempt.blame}" if attempt.blame else ""
        error = f" ({attempt.error})" if attempt.error else ""
        what = f"{_count(attempt.tokens, 'token')} on {where}, end: {attempt.end or 'under way'}{blame}{error}"
        yield Stage("attempt", attempt.placed_seconds, ended - attempt.placed_seconds, what)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _ending(record: RequestRecord) -> str:
    again = f", in {record.attempts} attempts" if record.attempts > 1 else ""
    blame = f", the {record.blame} leg's fault" if record.blame else ""
    failure = f", failed: {record.error}{blame}" if record.error else ""
    return f"{again}{failure}" if record.error else f"{again}, end: {record.finish_reason}"


def _bar(row: Stage, end: float) -> Text:
    if row.start is None or end <= 0:
        return Text("")
    offset = min(BAR_WIDTH - 1, round(row.start / end * BAR_WIDTH))
    length = round((row.start + row.seconds) / end * BAR_WIDTH) - offset
    bar = _BAR * min(length, BAR_WIDTH - offset) if length > 0 else _MARK
    return Text(" " * offset + bar, "dim" if row.name.startswith(" ") else "")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _rate(amount: float, seconds: float, unit: str) -> str:
    """`, 12.3 unit` with three digits or more; nothing for no time at all."""
    if seconds <= 0:
        return ""
    rate = amount / seconds
    return f", {rate:,.0f} {unit}" if rate >= 100 else f", {rate:.3g} {unit}"

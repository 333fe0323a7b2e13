"""`baton status`: the pools as bootstrap sees them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from cluster.messages import MemberStatus

_HEALTH_STYLES = {"ready": "green", "unready": "yellow", "stalled": "red", "silent": "red"}


def health(status: MemberStatus, lease_seconds: float) -> str:
    """ready; unready: it takes no work by its own word; stalled: it makes no progress; silent: no heartbeat for longer
    than a lease."""
    if status.age_seconds > lease_seconds:
        return "silent"
    if status.load.stalled:
        return "stalled"
    return "ready" if status.load.ready else "unready"


def status_table(workers: Sequence[MemberStatus], lease_seconds: float) -> Table:
    """One row for each worker, prefill pool first."""
    table = Table(box=None, pad_edge=False)
    for name in ("worker", "role", "epoch", "health"):
        table.add_column(name)
    for name in ("queued", "running", "KV pages", "quarantined", "steps", "heartbeat"):
        table.add_column(name, justify="right")
    for status in sorted(workers, key=lambda status: (status.member.role != "prefill", status.member.worker)):
        member, load = status.member, status.load
        word = health(status, lease_seconds)
        table.add_row(
            member.worker,
            member.role.value,
            short_epoch(member.epoch),
            Text(word, _HEALTH_STYLES[word]),
            str(load.queued),
            str(load.running),
            f"{load.pages_used}/{load.pages_total}",
            str(load.pages_quarantined),
            str(load.steps),
            f"{status.age_seconds:.1f} s ago",
        )
    return table


def short_epoch(epoch: int) -> str:
    """Enough of an epoch (nanoseconds) to tell a worker from its predecessor: milliseconds, modulo twelve days."""
    return f"{epoch // 1_000_000 & 0x3FFFFFFF:08x}"

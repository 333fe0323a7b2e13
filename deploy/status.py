"""`baton status`: the pools as bootstrap sees them, and the workers that are on their way there."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from cluster.messages import MemberStatus, Role
from cluster.shards import Grid
from deploy.launchers.base import ProcessKind, Replica, ReplicaState

_HEALTH_STYLES = {"ready": "green", "unready": "yellow", "stalled": "red", "silent": "red"}
_NUMBERS = ("queued", "running", "KV pages", "quarantined", "steps", "heartbeat")


def health(status: MemberStatus, lease_seconds: float) -> str:
    """ready; unready: it takes no work by its own word; stalled: it makes no progress; silent: no heartbeat for longer
    than a lease."""
    if status.age_seconds > lease_seconds:
        return "silent"
    if status.load.stalled:
        return "stalled"
    return "ready" if status.load.ready else "unready"


def status_table(workers: Sequence[MemberStatus], lease_seconds: float, others: Sequence[Replica] = ()) -> Table:
    """One row for each worker, prefill pool first. `others` are those that their launcher knows and bootstrap does
    not. A worker's ranks have a column where any has more than one."""
    table = Table(box=None, pad_edge=False)
    divided = any(status.member.layout.grid.ranks > 1 for status in workers)
    for name in ("worker", "role", "epoch", "health", *(("ranks",) if divided else ())):
        table.add_column(name)
    for name in ("queued", "running", "KV pages", "quarantined", "steps", "heartbeat"):
        table.add_column(name, justify="right")
    rows = {
        (status.member.role.value, status.member.worker): _row(status, lease_seconds, divided=divided)
        for status in workers
    }
    rows |= {(replica.kind.value, replica.name): _other_row(replica) for replica in others}
    for role, name in sorted(rows, key=lambda row: (row[0] != Role.PREFILL.value, *row)):
        table.add_row(*rows[role, name])
    return table


def replica_table(replicas: Sequence[Replica]) -> Table:
    """One row for each, as its launcher sees it: where bootstrap can't be asked. Names are never cut: they are what
    other commands take."""
    table = Table(box=None, pad_edge=False)
    table.add_column("name", min_width=max(len(each.name) for each in replicas))
    for name in ("kind", "state", "node", "reason"):
        table.add_column(name)
    order = list(ProcessKind)
    for each in sorted(replicas, key=lambda each: (order.index(each.kind), each.name)):
        table.add_row(each.name, each.kind.value, _state(each), each.node, each.reason)
    return table


def _row(status: MemberStatus, lease_seconds: float, *, divided: bool) -> list[str | Text]:
    member, load = status.member, status.load
    word = health(status, lease_seconds)
    return [
        member.worker,
        member.role.value,
        short_epoch(member.epoch),
        Text(word, _HEALTH_STYLES[word]),
        *([_ranks(member.layout.grid)] if divided else []),
        str(load.queued),
        str(load.running),
        f"{load.pages_used}/{load.pages_total}",
        str(load.pages_quarantined),
        str(load.steps),
        f"{status.age_seconds:.1f} s ago",
    ]


def _ranks(grid: Grid) -> str:
    """How many; of several stages, in each."""
    return str(grid.shards) if grid.stages == 1 else f"{grid.stages} stages x {grid.shards}"


def _other_row(replica: Replica) -> list[str | Text]:
    reason = f": {replica.reason}" if replica.reason else ""
    return [replica.name, replica.kind.value, "", _state(replica).append(reason)]


def _state(replica: Replica) -> Text:
    return Text(replica.state.value, "green" if replica.state is ReplicaState.READY else "yellow")


def short_epoch(epoch: int) -> str:
    """Enough of an epoch (nanoseconds) to tell a worker from its predecessor: milliseconds, modulo twelve days."""
    return f"{epoch // 1_000_000 & 0x3FFFFFFF:08x}"

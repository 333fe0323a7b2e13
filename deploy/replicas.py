"""What is known of each process of a supervised cluster, put together. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from cluster.messages import MemberStatus
from deploy.launchers.base import ProcessKind, Replica, ReplicaState
from deploy.launchers.processes import ProcessSpec, ProcessStatus

Roster = Sequence[MemberStatus]


class Seen(NamedTuple):
    """From outside, at one moment."""

    roster: Roster | None
    """None: bootstrap does not answer."""
    router_healthy: bool


def replicas(
    specs: Sequence[ProcessSpec], processes: Mapping[str, ProcessStatus], leaving: Set[str], seen: Seen
) -> list[Replica]:
    """Of each of `specs`; `leaving` are the names of those that are being stopped."""
    return [_replica(spec, processes.get(spec.name), spec.name in leaving, seen) for spec in specs]


def member_of(process: ProcessStatus, roster: Roster) -> MemberStatus | None:
    """The roster's word on this very life of a worker: it may still have that of a former one."""
    for status in roster:
        if status.member.worker == process.name and status.member.epoch >= process.started_ns:
            return status
    return None


def _replica(spec: ProcessSpec, process: ProcessStatus | None, leaving: bool, seen: Seen) -> Replica:
    if process is None or not process.running:
        state = ReplicaState.DRAINING if leaving else ReplicaState.WAITING
        return Replica(spec.name, spec.kind, state, "", reason="it has ended" if leaving else "it is started anew")
    if process.waiting_for:
        return Replica(spec.name, spec.kind, ReplicaState.WAITING, "", reason=f"waits for {process.waiting_for}")
    if leaving:
        state, reason = ReplicaState.DRAINING, ""
    else:
        reason = _obstacle(spec.kind, process, seen)
        state = ReplicaState.STARTING if reason else ReplicaState.READY
    return Replica(spec.name, spec.kind, state, process.instance, process.node, reason)


def _obstacle(kind: ProcessKind, process: ProcessStatus, seen: Seen) -> str:
    """Why it can't work now; empty if it can."""
    if kind is ProcessKind.ROUTER:
        return "" if seen.router_healthy else "it is not healthy"
    if seen.roster is None:
        return "bootstrap does not answer"
    if kind is ProcessKind.BOOTSTRAP:
        return ""
    status = member_of(process, seen.roster)
    if status is None:
        return "bootstrap does not know it"
    return "" if status.load.ready else status.load.stalled or "it takes no work now"

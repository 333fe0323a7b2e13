"""Which processes a topology is, and in which order they are stopped. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.config import Topology
from cluster.messages import Role
from deploy.launchers.base import ProcessKind
from deploy.launchers.processes import ProcessSpec


def processes(topology: Topology) -> list[ProcessSpec]:
    """All processes of the cluster, in the order of their start."""
    return [
        ProcessSpec("bootstrap", ProcessKind.BOOTSTRAP, "bootstrap", ()),
        *(worker(Role.PREFILL, index) for index in range(topology.prefill.replicas)),
        *(worker(Role.DECODE, index) for index in range(topology.decode.replicas)),
        ProcessSpec("router", ProcessKind.ROUTER, "router", ()),
    ]


def worker(role: Role, index: int) -> ProcessSpec:
    """One worker of a pool."""
    kind = ProcessKind(role.value)
    return ProcessSpec(f"{role.value}-{index}", kind, f"{role.value}_worker", ("--index", str(index)))


def stop_order(specs: Iterable[ProcessSpec]) -> list[list[str]]:
    """Names in groups, to be stopped one group after the other: no new work, then no work, then nobody to ask for."""
    router: list[str] = []
    workers: list[str] = []
    bootstrap: list[str] = []
    group = {ProcessKind.ROUTER: router, ProcessKind.BOOTSTRAP: bootstrap}
    for spec in specs:
        group.get(spec.kind, workers).append(spec.name)
    return [router, workers, bootstrap]

"""Which processes a topology is, and in which order they are stopped. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.config import Topology
from deploy.launchers.base import ProcessKind
from deploy.launchers.processes import ProcessSpec


def processes(topology: Topology, topology_file: str) -> list[ProcessSpec]:
    """All processes of the cluster, in the order of their start; each reads `topology_file`."""
    common = ("--topology", topology_file)

    def workers(kind: ProcessKind, replicas: int) -> Iterable[ProcessSpec]:
        for index in range(replicas):
            yield ProcessSpec(f"{kind.value}-{index}", kind, f"{kind.value}_worker", (*common, "--index", str(index)))

    return [
        ProcessSpec("bootstrap", ProcessKind.BOOTSTRAP, "bootstrap", common),
        *workers(ProcessKind.PREFILL, topology.prefill.replicas),
        *workers(ProcessKind.DECODE, topology.decode.replicas),
        ProcessSpec("router", ProcessKind.ROUTER, "router", common),
    ]


def stop_order(specs: Iterable[ProcessSpec]) -> list[list[str]]:
    """Names in groups, to be stopped one group after the other: no new work, then no work, then nobody to ask for."""
    router: list[str] = []
    workers: list[str] = []
    bootstrap: list[str] = []
    group = {ProcessKind.ROUTER: router, ProcessKind.BOOTSTRAP: bootstrap}
    for spec in specs:
        group.get(spec.kind, workers).append(spec.name)
    return [router, workers, bootstrap]

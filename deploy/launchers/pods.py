"""What Kubernetes tells of a cluster's pods and pools, and what that means for a `Replica`. Pure.

The objects as `kubectl get --output=json` prints them, as far as we read them; see the reference of Kubernetes' API.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from deploy.launchers.base import ProcessKind, Replica, ReplicaState

COMPONENT = "app.kubernetes.io/component"
"""The label that tells a pod's `ProcessKind`; the chart's other labels tell whose pods they are."""


class Part(msgspec.Struct, frozen=True, rename="camel"):
    """Of an object; unknown fields are ignored."""


class Metadata(Part, frozen=True):
    name: str
    uid: str
    creation_timestamp: str
    """In UTC, so that later ones are greater as texts."""
    deletion_timestamp: str | None = None
    generation: int = 0
    labels: dict[str, str] = {}


class Condition(Part, frozen=True):
    type: str
    status: str
    reason: str = ""
    message: str = ""


class Waiting(Part, frozen=True):
    reason: str = ""
    message: str = ""


class Terminated(Part, frozen=True):
    exit_code: int = 0
    reason: str = ""


class ContainerState(Part, frozen=True):
    waiting: Waiting | None = None
    terminated: Terminated | None = None


class ContainerStatus(Part, frozen=True):
    restart_count: int
    state: ContainerState = ContainerState()
    last_state: ContainerState = ContainerState()


class PodSpec(Part, frozen=True):
    node_name: str = ""


class PodStatus(Part, frozen=True):
    phase: str = "Pending"
    conditions: list[Condition] = []
    container_statuses: list[ContainerStatus] = []


class Pod(Part, frozen=True):
    metadata: Metadata
    spec: PodSpec
    status: PodStatus

    @property
    def name(self) -> str:
        return self.metadata.name

    @property
    def kind(self) -> ProcessKind:
        return ProcessKind(self.metadata.labels[COMPONENT])

    @property
    def leaving(self) -> bool:
        """It was asked to end."""
        return self.metadata.deletion_timestamp is not None

    @property
    def crashes(self) -> int:
        """How often its container has ended by itself."""
        return sum(each.restart_count for each in self.status.container_statuses)

    def condition(self, kind: str) -> Condition:
        found = (each for each in self.status.conditions if each.type == kind)
        return next(found, Condition(kind, "Unknown"))


class PoolSpec(Part, frozen=True):
    replicas: int = 1


class PoolStatus(Part, frozen=True):
    observed_generation: int = 0
    replicas: int = 0
    updated_replicas: int = 0
    ready_replicas: int = 0
    conditions: list[Condition] = []


GROUPS = "LeaderWorkerSet"
"""The kind of a pool whose workers are groups of pods: those that we see of it are the groups' leaders."""


class Deployment(Part, frozen=True):
    """One component: a pool, the routers, or bootstrap. A LeaderWorkerSet is told alike."""

    metadata: Metadata
    spec: PoolSpec
    status: PoolStatus
    made_as: str = msgspec.field(default="Deployment", name="kind")

    @property
    def reference(self) -> str:
        """As kubectl names it."""
        return f"{self.made_as.lower()}/{self.metadata.name}"

    @property
    def in_groups(self) -> bool:
        return self.made_as == GROUPS

    @property
    def kind(self) -> ProcessKind:
        return ProcessKind(self.metadata.labels[COMPONENT])

    @property
    def rolled_out(self) -> bool:
        """All of its pods are as it says now, and are ready; none is left of how it was before."""
        status = self.status
        counts = {status.replicas, status.updated_replicas, status.ready_replicas}
        return status.observed_generation >= self.metadata.generation and counts == {self.spec.replicas}

    @property
    def obstacle(self) -> str:
        """Why pods can't even be made, such as a quota; empty if they can."""
        failures = (each for each in self.status.conditions if each.type == "ReplicaFailure" and each.status == "True")
        return next((each.message for each in failures), "")


class View(NamedTuple):
    """Of one cluster, at one moment."""

    deployments: list[Deployment]
    pods: list[Pod]

    def deployment(self, kind: ProcessKind) -> Deployment | None:
        return next((each for each in self.deployments if each.kind is kind), None)

    def pool(self, kind: ProcessKind) -> list[Pod]:
        """The pods that are not leaving, oldest first."""
        staying = (pod for pod in self.pods if pod.kind is kind and not pod.leaving)
        return sorted(staying, key=lambda pod: (pod.metadata.creation_timestamp, pod.name))

    def has_size(self, kind: ProcessKind, size: int) -> bool:
        """So many take work, and nobody else is there."""
        pods = [replica(pod) for pod in self.pods if pod.kind is kind]
        return len(pods) == size and all(each.state is ReplicaState.READY for each in pods)

    def has_none(self, kinds: Sequence[ProcessKind]) -> bool:
        return not any(pod.kind in kinds for pod in self.pods)

    def is_whole(self, kinds: Sequence[ProcessKind]) -> bool:
        """All that should be there takes work, and is as it should be now; nothing else is there."""
        deployments = [each for each in self.deployments if each.kind in kinds]
        return all(each.rolled_out and self.has_size(each.kind, each.spec.replicas) for each in deployments)

    @property
    def replicas(self) -> list[Replica]:
        return [replica(pod) for pod in self.pods] + [
            Replica(each.metadata.name, each.kind, ReplicaState.WAITING, "", reason=each.obstacle)
            for each in self.deployments
            if each.obstacle
        ]


def replica(pod: Pod) -> Replica:
    state, reason = _state(pod)
    # A container that is started again stays in its pod.
    instance = "" if state is ReplicaState.WAITING else f"{pod.metadata.uid}/{pod.crashes}"
    return Replica(pod.name, pod.kind, state, instance, pod.spec.node_name, reason)


def _state(pod: Pod) -> tuple[ReplicaState, str]:
    """And why it is not ready."""
    if pod.leaving:
        return ReplicaState.DRAINING, ""
    if not pod.spec.node_name:
        return ReplicaState.WAITING, pod.condition("PodScheduled").message or "it is not scheduled yet"
    if pod.condition("Ready").status == "True":
        return ReplicaState.READY, ""
    for container in pod.status.container_statuses:
        if container.state.waiting is not None:
            return _waiting(container.state.waiting, container.last_state.terminated)
        if container.state.terminated is not None:
            return ReplicaState.WAITING, _end(container.state.terminated)
    return ReplicaState.STARTING, pod.condition("Ready").message


def _waiting(waiting: Waiting, last: Terminated | None) -> tuple[ReplicaState, str]:
    if last is not None:
        return ReplicaState.WAITING, f"{_end(last)}; it is started anew"
    return ReplicaState.STARTING, ": ".join(word for word in (waiting.reason, waiting.message) if word)


def _end(end: Terminated) -> str:
    return (
        f"its process ended (exit code {end.exit_code}{f', {end.reason}' if end.reason not in ('', 'Error') else ''})"
    )


class _Listed(msgspec.Struct, frozen=True):
    items: Sequence[msgspec.Raw]


def parse_pods(text: bytes) -> list[Pod]:
    """Those that have not ended for good: evicted ones, and those of a lost node, stay as records while others take
    their place. Raises `msgspec.DecodeError`."""
    pods = [msgspec.json.decode(item, type=Pod) for item in msgspec.json.decode(text, type=_Listed).items]
    return [pod for pod in pods if pod.status.phase not in ("Failed", "Succeeded")]


def parse_deployments(text: bytes) -> list[Deployment]:
    """Raises `msgspec.DecodeError`."""
    return [msgspec.json.decode(item, type=Deployment) for item in msgspec.json.decode(text, type=_Listed).items]

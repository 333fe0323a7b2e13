"""A cluster on Kubernetes, which supervises its pods itself: we say what should be, and wait until it is.

Pools are Deployments, so a worker is any pod of one, and is named as its pod is. Which of them leave when a pool
shrinks is our choice and not the controller's, who would take one from the fullest node: those pods are deleted, which
drains them, and at once the pool's size is lowered. A pod that the controller makes in between is the first that it
takes away, since it is not ready.

A pool whose workers are on several nodes is a LeaderWorkerSet, and a worker the leader of a group of pods. Groups are
numbered, and the last ones leave first: that is not our choice.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from cluster.clock import Clock
from cluster.config import Topology
from cluster.errors import LaunchError, NotFound
from cluster.topology import dump_topology
from deploy.kubernetes.chart import Chart, Object, Release, read_values
from deploy.launchers.base import ProcessKind, Replica, ReplicaState, Sizes
from deploy.launchers.kubectl import Kubectl
from deploy.launchers.pods import COMPONENT, GROUPS, Deployment, Pod, View, parse_deployments, parse_pods, replica
from deploy.pools import require_sizes

POLL_SECONDS = 0.5
MOST_CRASHES = 3
"""A process that has ended so often before it was ever ready is wrong in itself."""
STOP_SECONDS = 60.0
"""For Kubernetes' own part in an end, beside the time that pods have to drain."""
_LAST_WORDS = 15
_OWNED = ("app.kubernetes.io/name", "app.kubernetes.io/instance")
"""The labels that tell one installation's objects."""
_AUTOSCALERS = ("HorizontalPodAutoscaler", "ScaledObject")
_MANAGER = "app.kubernetes.io/managed-by"
_POOLS = (ProcessKind.PREFILL, ProcessKind.DECODE)
_STOP_ORDER = ((ProcessKind.ROUTER,), _POOLS, (ProcessKind.BOOTSTRAP,))

Tell = Callable[[str], None]


def render(topology: Topology) -> list[Object]:
    """The objects of this topology's cluster. Raises `ConfigError`."""
    config = topology.kubernetes
    values, origin = read_values(Path(config.values_file) if config.values_file else None)
    return Chart().render(dump_topology(topology), values, origin, Release(config.release, config.namespace))


class KubernetesCluster:
    """A `Cluster`. It holds nothing: each call looks at what is there."""

    def __init__(
        self, topology: Topology, objects: Sequence[Object], clock: Clock, patience_seconds: float, tell: Tell
    ) -> None:
        """`objects`: what `render` makes of the topology. `patience_seconds`: for one worker to end, or to be
        ready; those of a pool do so at the same time."""
        config = topology.kubernetes
        self.kubectl = Kubectl(config.namespace, config.context)
        self._topology = topology
        self._objects = list(objects)
        self._clock = clock
        self._patience = patience_seconds
        self._tell = tell
        labels = self._objects[0]["metadata"]["labels"]
        self._pools_as = ",".join(_pool_kinds(objects))
        kinds = f"{COMPONENT} in ({','.join(kind.value for kind in ProcessKind)})"
        self._selector = ",".join([*(f"{label}={labels[label]}" for label in _OWNED), kinds])

    async def status(self) -> list[Replica]:
        return (await self.view()).replicas

    async def scale(self, sizes: Sizes) -> None:
        require_sizes(self._topology, sizes)
        self._require_no_autoscaler()
        view = await self.view()
        wanted = {ProcessKind(role.value): size for role, size in sizes.items()}
        for kind, size in wanted.items():
            if size > 0 or view.deployment(kind) is not None:
                await self._resize(_deployment(view, kind), [pod.name for pod in view.pool(kind)[size:]], size)
        words = " ".join(f"{kind.value}={size}" for kind, size in wanted.items())
        await self.until(
            lambda view: all(view.has_size(kind, size) for kind, size in wanted.items()), f"{words} is not reached"
        )

    async def drain(self, workers: Sequence[str]) -> None:
        view = await self.view()
        leaving = _workers(view, workers)
        _require_last(view, leaving)
        for kind in _POOLS:
            names = [pod.name for pod in leaving if pod.kind is kind]
            if names:
                await self._resize(_deployment(view, kind), names, len(view.pool(kind)) - len(names))
        await self.until(
            lambda view: not {pod.name for pod in view.pods} & set(workers), f"{' '.join(workers)}: not ended"
        )

    async def restart(self, workers: Sequence[str]) -> None:
        view = await self.view()
        for pod in _workers(view, workers):
            back = partial(View.has_size, kind=pod.kind, size=len(view.pool(pod.kind)))
            await self._delete([pod.name])
            await self.until(back, f"{pod.name} has no successor that takes work")
        if not workers:
            for deployment in [each for each in view.deployments if each.kind in _POOLS]:
                if deployment.in_groups:  # kubectl has no rollout of these
                    for pod in view.pool(deployment.kind):
                        await self.restart([pod.name])
                    continue
                await self.kubectl.run("rollout", "restart", deployment.reference)
                new = partial(View.is_whole, kinds=(deployment.kind,))
                await self.until(new, "not all workers are new", self._patience * max(1, deployment.spec.replicas))

    async def logs(self, name: str, lines: int, *, follow: bool) -> AsyncGenerator[str, None]:
        _find(await self.view(), name)
        async for line in self.kubectl.lines("logs", name, f"--tail={lines}", f"--follow={str(follow).lower()}"):
            yield line

    async def stop(self, grace_seconds: float) -> None:
        self.require_ours(await self.view())
        grace = f"--grace-period={max(1, math.ceil(grace_seconds))}"
        for kinds in _STOP_ORDER:
            view = await self.view()
            deployments = [each.reference for each in view.deployments if each.kind in kinds]
            pods = [pod.name for pod in view.pods if pod.kind in kinds]
            if deployments:
                await self.kubectl.run("delete", *deployments, "--ignore-not-found", "--wait=false")
            if pods:
                await self.kubectl.run("delete", "pods", *pods, "--ignore-not-found", "--wait=false", grace)
            await self.until(partial(View.has_none, kinds=kinds), "not all have ended", grace_seconds + STOP_SECONDS)
        await self.kubectl.run("delete", "--filename=-", "--ignore-not-found", given=_as_list(self._objects))

    async def view(self) -> View:
        """Raises `LaunchError`."""
        deployments, pods = await asyncio.gather(
            *(
                self.kubectl.run("get", kind, "--selector", self._selector, "--output=json")
                for kind in (self._pools_as, "pods")
            )
        )
        try:
            return View(parse_deployments(deployments), parse_pods(pods))
        except msgspec.DecodeError as error:
            raise LaunchError(f"kubectl get: not the objects that we know: {error}") from error

    async def until(self, condition: Callable[[View], bool], complaint: str, seconds: float | None = None) -> None:
        """Waits, by default as long as for one worker, and tells of each change meanwhile. Raises `LaunchError` with
        what is missing then."""
        patience = self._patience if seconds is None else seconds
        told: dict[str, str] | None = None
        deadline = self._clock.now() + patience
        while not condition(view := await self.view()):
            lines = {each.name: _line(each) for each in view.replicas}
            for line in _news(told, lines):
                self._tell(line)
            told = lines
            if self._clock.now() > deadline:
                missing = [_line(each) for each in view.replicas if each.state is not ReplicaState.READY]
                raise LaunchError("\n".join([f"{complaint} within {patience:g} s", *missing]))
            await asyncio.sleep(POLL_SECONDS)

    def require_ours(self, view: View) -> None:
        """Raises `LaunchError` for what Helm has installed."""
        if any(each.metadata.labels.get(_MANAGER) == "Helm" for each in view.deployments):
            release = self._topology.kubernetes.release
            raise LaunchError(
                f"Helm has installed {release}, and knows what belongs to it: use helm upgrade or uninstall"
            )

    def _require_no_autoscaler(self) -> None:
        if any(made["kind"] in _AUTOSCALERS for made in self._objects):
            raise LaunchError("the pools have autoscalers (autoscaling.kind of the values), which would undo it")

    async def _resize(self, deployment: Deployment, leaving: Sequence[str], size: int) -> None:
        if leaving and not deployment.in_groups:
            await self._delete(leaving)
        await self.kubectl.run("scale", deployment.reference, f"--replicas={size}")

    async def _delete(self, pods: Sequence[str]) -> None:
        """Begins their drain."""
        await self.kubectl.run("delete", "pods", *pods, "--wait=false")


class KubernetesLauncher:
    """A `Launcher`. What it has brought up outlives it."""

    def __init__(self, topology: Topology, objects: Sequence[Object], clock: Clock, tell: Tell) -> None:
        """`objects`: what `render` makes of the topology; `tell` hears what happens."""
        self._topology = topology
        self._objects = list(objects)
        self._clock = clock
        self._tell = tell

    async def start(self, timeout_seconds: float) -> KubernetesCluster:
        cluster = KubernetesCluster(self._topology, self._objects, self._clock, timeout_seconds, self._tell)
        cluster.require_ours(await cluster.view())
        await cluster.kubectl.run("apply", "--filename=-", given=_as_list(await self._new_objects(cluster.kubectl)))
        ours = {(each["kind"], each["metadata"]["name"]) for each in self._objects}
        for deployment in (await cluster.view()).deployments:
            if (deployment.made_as, deployment.metadata.name) not in ours:  # a pool that the topology has no more
                await cluster.kubectl.run("delete", deployment.reference, "--wait=false")
        hopeless: list[Pod] = []

        def settled(view: View) -> bool:
            hopeless.extend(pod for pod in view.pods if pod.crashes >= MOST_CRASHES and _is_down(pod))
            return bool(hopeless) or view.is_whole(tuple(ProcessKind))

        await cluster.until(settled, "not all can serve")
        if hopeless:
            name, crashes = hopeless[0].name, hopeless[0].crashes
            words = await cluster.kubectl.run("logs", name, "--previous", f"--tail={_LAST_WORDS}")
            raise LaunchError(f"{name} has ended {crashes} times; the last time:\n{words.decode(errors='replace')}")
        return cluster

    async def _new_objects(self, kubectl: Kubectl) -> list[Object]:
        """Without secrets that are there already: rendered ones are new each time, and the cluster's stay."""
        there = (await kubectl.run("get", "secrets", "--output=name")).decode().split()
        return [made for made in self._objects if f"{made['kind']}/{made['metadata']['name']}".lower() not in there]


def _as_list(objects: Sequence[Object]) -> str:
    """As kubectl takes them: JSON, in which every text is unmistakably one."""
    return msgspec.json.encode({"kind": "List", "apiVersion": "v1", "items": objects}).decode()


def _pool_kinds(objects: Sequence[Object]) -> list[str]:
    """What kubectl is asked for; of a kind that it does not know it would complain."""
    groups = any(made["kind"] == GROUPS for made in objects)
    return ["deployments.apps", *(["leaderworkersets.leaderworkerset.x-k8s.io"] if groups else [])]


def _require_last(view: View, leaving: Sequence[Pod]) -> None:
    """Raises `LaunchError` for workers of a pool that gives up its last ones only."""
    for deployment in [each for each in view.deployments if each.in_groups]:
        own = sorted((pod.name for pod in view.pool(deployment.kind)), key=lambda name: int(name.rpartition("-")[2]))
        wanted = {pod.name for pod in leaving if pod.kind is deployment.kind}
        if wanted != set(own[len(own) - len(wanted) :]):
            last = ", ".join(own[len(own) - len(wanted) :])
            raise LaunchError(f"{deployment.reference} can give up its last workers only: {last}")


def _is_down(pod: Pod) -> bool:
    return replica(pod).state in (ReplicaState.WAITING, ReplicaState.STARTING)


def _deployment(view: View, kind: ProcessKind) -> Deployment:
    """Raises `LaunchError`."""
    found = view.deployment(kind)
    if found is None:
        raise LaunchError(f"there is no {kind.value} pool on this Kubernetes, or not in this namespace")
    return found


def _find(view: View, name: str) -> Pod:
    """Raises `NotFound`."""
    for pod in view.pods:
        if pod.name == name:
            return pod
    listed = ", ".join(sorted(pod.name for pod in view.pods)) or "none"
    raise NotFound(f"there is no {name}; the pods are: {listed}")


def _workers(view: View, names: Sequence[str]) -> list[Pod]:
    """Raises `NotFound`."""
    found = [_find(view, name) for name in names]
    others = [pod.name for pod in found if pod.kind not in _POOLS]
    if others:
        raise NotFound(f"no worker: {', '.join(others)}")
    return found


def _line(each: Replica) -> str:
    state = f"{each.name} is {each.state.value}"
    return f"{state}: {each.reason}" if each.reason else state


def _news(before: dict[str, str] | None, now: dict[str, str]) -> list[str]:
    """What is to be told; nothing at the first look."""
    if before is None:
        return []
    changed = [line for name, line in now.items() if before.get(name) != line]
    return changed + [f"{name} has ended" for name in before if name not in now]

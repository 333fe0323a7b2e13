"""What a launcher must do: bring one cluster to life somewhere, and give it into the hands of its operators.

Places are of two kinds. Some only run processes (this machine, Ray): `deploy.session` supervises them there, and asks
of the place what `deploy.launchers.processes` says. Others supervise themselves (Kubernetes) and are told what should
be. Both look alike from here: `baton up` calls a `Launcher`, all other commands call a `Cluster`, and the tests in
`tests/process/launcher_conformance.py` hold for each.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from enum import Enum
from typing import Protocol

import msgspec

from cluster.messages import Role


class ProcessKind(str, Enum):
    BOOTSTRAP = "bootstrap"
    PREFILL = "prefill"
    DECODE = "decode"
    ROUTER = "router"


class ReplicaState(str, Enum):
    WAITING = "waiting"
    """It has no place yet: no node has what it needs, or it waits to be started again."""
    STARTING = "starting"
    """It has a place and loads; or it has said itself that it can't take work now."""
    READY = "ready"
    DRAINING = "draining"
    """It takes no new work and will end."""


class Replica(msgspec.Struct, frozen=True):
    """One of a cluster's bootstraps, workers and routers, as its launcher sees it."""

    name: str
    """A worker's name in the cluster."""
    kind: ProcessKind
    state: ReplicaState
    instance: str
    """Of two lives of one name, different; empty while it waits."""
    node: str = ""
    """Where it runs, for people; empty while it waits."""
    reason: str = ""
    """Why it is not ready, where that is known; what it waits for."""


Sizes = Mapping[Role, int]
"""How many workers pools should have; a pool that is not named stays as it is."""


class Cluster(Protocol):
    """A cluster that runs, for those who operate it. Called on one event loop, by one caller at a time.

    Whoever makes one says where news go ("decode-1 is draining"): changes take as long as workers do. What the place
    does not do, or not in time, is a `LaunchError` that says what is missing; whether it goes on trying is its affair.
    """

    async def status(self) -> list[Replica]:
        """All that should run, and all that has not ended yet; those that were asked to end and did are left out."""

    async def scale(self, sizes: Sizes) -> None:
        """Returns when the pools have these sizes: new workers take work, the youngest of those too many have drained
        and are gone. Pools change at the same time; requests under way lose nothing. Raises `ConfigError`, before
        anything is done, for a size that the topology does not allow (see `deploy.pools.require_sizes`)."""

    async def drain(self, workers: Sequence[str]) -> None:
        """Returns when these have ended in order. They are not started again: their pools are smaller by them. Raises
        `NotFound`, before anything is done, if one is not known."""

    async def restart(self, workers: Sequence[str]) -> None:
        """Drains and starts anew one after the other, the next when the last one takes work again; no name: all
        workers. A place that can't keep names gives the successor another one. Raises as `drain` does."""

    def logs(self, name: str, lines: int, *, follow: bool) -> AsyncGenerator[str, None]:
        """The last `lines` lines of any replica's log, oldest first; with `follow` all that come, until it is closed.
        Raises `NotFound`."""

    async def stop(self, grace_seconds: float) -> None:
        """Ends it all: routers, then workers, then bootstrap, each with as much time to drain. Returns when nothing of
        it is left. Stopping twice is fine."""


class Launcher(Protocol):
    """Knows one topology and one kind of place. What it has brought up may outlive it (Kubernetes) or not (local, Ray):
    `deploy.operate` knows how another process reaches it."""

    async def start(self, timeout_seconds: float) -> Cluster:
        """Returns when all that the topology names can serve. What is there already is made what the topology says.

        Raises `LaunchError` with the reason if something can't be started, dies, or is not ready in time; the caller
        then decides about what was started, with `Cluster.stop` or by leaving it.
        """

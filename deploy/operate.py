"""Finding the cluster that a command is about: whose topology it has, or else the one with bootstrap's usual port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

from cluster.clock import MonotonicClock
from cluster.config import Bootstrap, LauncherName, Router, Security, Topology
from cluster.topology import load_topology
from deploy.cluster_client import ask_bootstrap, ask_router
from deploy.control_client import connect
from deploy.launchers.base import Cluster
from deploy.launchers.kubernetes import KubernetesCluster, render
from deploy.rolling import Rolling
from deploy.run_directory import Running, find_running
from deploy.unsupervised import UnsupervisedCluster


async def find_topology(path: Path | None, overrides: Sequence[str]) -> Topology | None:
    """What a running `baton up` made of the topology at `path`, addresses included; the topology itself where none
    runs; None without either. Raises `ConfigError`."""
    written = load_topology(path, overrides) if path else None
    running = await _alive(written)
    return written if running is None else load_topology(running.topology_file)


@asynccontextmanager
async def open_cluster(
    topology: Topology | None, tell: Callable[[str], None], patience_seconds: float
) -> AsyncIterator[Cluster]:
    """The cluster of `find_topology`, wherever it runs; `patience_seconds` is for one worker to end or to be ready."""
    if topology is not None and topology.launch is LauncherName.KUBERNETES:
        yield KubernetesCluster(topology, render(topology), MonotonicClock(), patience_seconds, tell)
        return
    running = await _alive(topology)
    if running is not None:
        async with connect(running, tell, patience_seconds) as cluster:
            yield cluster
        return
    config = topology or _Defaults
    async with (
        ask_bootstrap(config.bootstrap, config.security) as bootstrap,
        ask_router(config.router, config.security) as router,
    ):
        rolling = Rolling(bootstrap, router, MonotonicClock(), patience_seconds, tell)
        missing = f"no `baton up` of this user on this machine has bootstrap's port {config.bootstrap.port}"
        yield UnsupervisedCluster(bootstrap, rolling, missing)


class _Defaults:
    bootstrap = Bootstrap()
    router = Router()
    security = Security()


async def _alive(topology: Topology | None) -> Running | None:
    """The `baton up` of this topology, if it answers."""
    if topology is not None and topology.launch is LauncherName.KUBERNETES:
        return None
    running = find_running((topology or _Defaults).bootstrap.port)
    if running is None:
        return None
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(running.socket))) as http,
            http.get("http://baton/replicas"),
        ):
            return running
    except aiohttp.ClientError:
        return None

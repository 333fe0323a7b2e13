"""A `baton up` as a place for `launcher_conformance`: operated from another process, on whatever runs its workers."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.topology import load_topology
from deploy.control_client import connect
from deploy.run_directory import find_running
from tests.process.baton_command import PATIENCE, Baton
from tests.process.launcher_conformance import Place, require_stopped


@asynccontextmanager
async def operated(baton: Baton) -> AsyncIterator[Place]:
    """Waits until `baton`, which was told to bring a cluster up, has done so. At the end nothing of it may be left."""
    await baton.says("ready: ")
    running = find_running(load_topology(baton.run_directory / "topology.yaml").bootstrap.port)
    assert running is not None

    async def kill(name: str) -> None:
        os.kill(baton.pid(name), signal.SIGKILL)

    async with connect(running, lambda _line: None, PATIENCE) as cluster:
        yield Place(cluster, kill)
        await require_stopped(cluster)
    assert await baton.ends() == 0
    assert baton.left_over() == []

"""The Kubernetes launcher keeps what every launcher does, and says what only Kubernetes knows.

The workers are real control processes with stand-ins for engines: what is tried is who starts and ends them.
"""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import LaunchError
from cluster.messages import Role
from deploy.launchers.base import ReplicaState
from tests.kubernetes.installation import Installation, with_metronomes
from tests.process.launcher_conformance import *  # noqa: F403
from tests.process.launcher_conformance import Place, require_stopped

pytestmark = pytest.mark.kubernetes

SETTINGS = ("decode.replicas=2", "worker.drain_seconds=1", "router.drain_seconds=1")
VALUES = {
    "decode": {"resources": {"limits": {"nvidia.com/gpu": 1}}},  # the nodes have 3
    "router": {"replicas": 1, "preStopSeconds": 0},
}


@pytest.fixture(scope="module")
def installation(kubernetes, tmp_path_factory):
    installation = Installation(kubernetes, "launcher", SETTINGS, VALUES, tmp_path_factory.mktemp("launcher"))
    try:
        cluster = installation.start(with_metronomes)
        yield installation
        asyncio.run(require_stopped(cluster))
        left = installation.kubectl("get", "all,configmaps,secrets,networkpolicies", "--output=name").split()
        assert not [name for name in left if "baton" in name]
    finally:
        installation.stop()


@pytest.fixture(scope="module")
def place(installation):
    async def kill(name):
        installation.kill(name)

    return Place(installation.cluster(), kill)


async def test_a_worker_that_fits_nowhere_is_told_with_the_schedulers_reason(installation, place):
    await place.scaled(1, 1)
    with pytest.raises(LaunchError, match=r"decode=4 is not reached within 20 s\n.*Insufficient nvidia.com/gpu"):
        await installation.cluster(patience=20.0).scale({Role.DECODE: 4})
    (waiting,) = [each for each in await place.cluster.status() if each.state is ReplicaState.WAITING]
    assert "Insufficient nvidia.com/gpu" in waiting.reason
    assert (waiting.instance, waiting.node) == ("", "")
    assert len(await place.pool(Role.DECODE)) == 3
    table, code = await asyncio.to_thread(installation.baton, "status", f"--topology={installation.file}")
    assert code == 0
    (line,) = [line for line in table.splitlines() if waiting.name in line]
    assert line.split()[1:3] == ["decode", "waiting"] and "nodes are available" in line
    assert "nvidia.com/gpu" in table and all(name in table for name in await place.pool(Role.DECODE))
    await place.scaled(1, 1)


async def test_the_command_line_reaches_it_by_its_topology(installation, place):
    await place.scaled(1, 1)
    about = f"--topology={installation.file}"
    output, code = await asyncio.to_thread(installation.baton, "scale", "decode=2", about)
    assert code == 0, output
    pool = await place.pool(Role.DECODE)
    assert len(pool) == 2
    output, code = await asyncio.to_thread(installation.baton, "logs", min(pool), about, "--lines=3")
    assert code == 0 and len(output.splitlines()) == 3
    output, code = await asyncio.to_thread(installation.baton, "drain", "nobody-7", about)
    assert code == 1 and "there is no nobody-7; the pods are: baton-" in output


async def test_a_worker_that_can_not_start_ends_the_start_with_its_last_words(kubernetes, tmp_path):
    settings = ("model.path=/nowhere", "worker.drain_seconds=1")
    broken = Installation(kubernetes, "broken", settings, VALUES, tmp_path)
    try:
        output, code = await asyncio.to_thread(broken.baton, "up", str(broken.file), "--start-timeout=120")
        assert code == 1
        assert "has ended 3 times; the last time:" in output and "/nowhere" in output
    finally:
        await asyncio.to_thread(broken.stop)

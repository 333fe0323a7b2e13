"""`baton up` on the Ray nodes of `tests.ray.nodes`, and the commands that operate it, as a user runs them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from bench.cluster import free_ports
from deploy.control_client import RemoteCluster, connect
from deploy.launchers.base import Replica, ReplicaState
from deploy.run_directory import find_running

PATIENCE = 300.0
"""For whatever happens while every core is busy with other workers."""
POLL_SECONDS = 0.1


class UpCluster:
    """One `baton up`. `running` makes it."""

    def __init__(self, topology: Path, settings: Sequence[str], directory: Path) -> None:
        router, self._port = free_ports(2)
        self.url = f"http://127.0.0.1:{router}"
        self.directory = directory
        self._topology = topology
        self._settings = [f"router.port={router}", f"bootstrap.port={self._port}", *settings]

    async def baton(self, *arguments: str) -> str:
        """What another `baton` command prints about this cluster; fails with that, if it fails."""
        chosen = [word for setting in self._settings for word in ("--set", setting)]
        command = ["-m", "deploy.cli", *arguments, "--topology", str(self._topology), *chosen]
        process = await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode == 0, output.decode()
        return output.decode()

    @asynccontextmanager
    async def operated(self) -> AsyncIterator[RemoteCluster]:
        found = find_running(self._port)
        assert found is not None
        async with connect(found, lambda _line: None, PATIENCE) as cluster:
            yield cluster

    async def until_ready(self, count: int) -> list[Replica]:
        """Until so many replicas run and all can serve; returns them."""
        return await self.until_all(
            lambda found: len(found) == count and all(each.state is ReplicaState.READY for each in found)
        )

    async def until_all(self, condition: Callable[[Sequence[Replica]], bool]) -> list[Replica]:
        """Until `condition` holds of all replicas; returns them."""

        async def holds() -> list[Replica]:
            async with self.operated() as cluster:
                while not condition(found := await cluster.status()):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(POLL_SECONDS)
                return found

        return await asyncio.wait_for(holds(), PATIENCE)

    async def up(self) -> asyncio.subprocess.Process:
        chosen = [word for setting in self._settings for word in ("--set", setting)]
        command = ["-m", "deploy.cli", "up", str(self._topology), "--log-dir", str(self.directory), *chosen]
        return await asyncio.create_subprocess_exec(
            sys.executable, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )


@asynccontextmanager
async def running(topology: Path, settings: Sequence[str], directory: Path) -> AsyncIterator[UpCluster]:
    """A cluster from its readiness to its end, which must be in order."""
    cluster = UpCluster(topology, settings, directory)
    process = await cluster.up()
    assert process.stdout is not None
    output = ""
    try:
        while "ready: " not in output:
            line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
            assert line, f"`baton up` ended:\n{output}"
            output += line.decode()
        reading = asyncio.ensure_future(process.stdout.read())
        yield cluster
        process.terminate()
        output += (await asyncio.wait_for(reading, PATIENCE)).decode()
        assert await process.wait() == 0, output
    finally:
        if process.returncode is None:
            process.kill()
        print(output)

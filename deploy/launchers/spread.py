"""Workers whose ranks are on several hosts, on a machine that plays all of these: for the session each is one process,
here it is one for each of its hosts. The end of any is the end of the worker, and all of them are started again."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from cluster.config import Decode, Prefill, Topology
from cluster.errors import LaunchError
from cluster.process import EXIT_DONE
from deploy.launchers.base import ProcessKind
from deploy.launchers.processes import ProcessExit, ProcessRunner, ProcessSpec, ProcessStatus

ORDERLY_SECONDS = 10.0
"""For the rest of a worker, one of whose hosts was asked to end and did."""


class SpreadProcesses:
    """A `ProcessRunner` over another one, which knows nothing of hosts."""

    def __init__(self, inner: ProcessRunner, topology: Topology) -> None:
        self._inner = inner
        self._scheme = topology.internal_scheme
        self._pools: Mapping[ProcessKind, Prefill | Decode] = {
            ProcessKind.PREFILL: topology.prefill,
            ProcessKind.DECODE: topology.decode,
        }
        self._further: dict[str, list[str]] = {}
        """The names of a worker's further processes."""
        self._over: set[str] = set()
        """Workers that have ended, and all of whose processes were ended."""

    async def start(self, process: ProcessSpec) -> None:
        pool = self._pools.get(process.kind)
        if pool is None or pool.nodes == 1:
            await self._inner.start(process)
            return
        port = _free_port(pool.host)
        leader = f"{self._scheme}://{pool.host}:{port}"
        parts = [host_of(process, node, pool.nodes, leader) for node in range(1, pool.nodes)]
        self._further[process.name] = [part.name for part in parts]
        self._over.discard(process.name)
        first = process._replace(arguments=(*process.arguments, "--port", str(port)), nodes=pool.nodes)
        for part in (first, *parts):
            await self._inner.start(part)

    async def stop(self, names: Sequence[str], grace_seconds: float) -> None:
        await self._inner.stop([part for name in names for part in self._parts(name)], grace_seconds)

    async def next_exit(self) -> ProcessExit:
        while True:
            end = await self._inner.next_exit()
            worker = next((name for name, further in self._further.items() if end.name in further), end.name)
            if worker not in self._further:
                return end
            if worker in self._over:  # of one that ended at the same time
                continue
            self._over.add(worker)
            orderly = end.code == EXIT_DONE
            await self._inner.stop(self._parts(worker), ORDERLY_SECONDS if orderly else 0.0)
            if end.name == worker or orderly:
                return ProcessExit(worker, end.code, end.lost)
            return ProcessExit(worker, end.code, lost=str(end))

    def status(self) -> list[ProcessStatus]:
        further = {name for names in self._further.values() for name in names}
        return [status for status in self._inner.status() if status.name not in further]

    def log_tail(self, name: str, lines: int) -> list[str]:
        return self._inner.log_tail(name, lines)

    def _parts(self, name: str) -> list[str]:
        return [name, *self._further.get(name, [])]


def host_of(process: ProcessSpec, node: int, nodes: int, leader: str) -> ProcessSpec:
    """What of a worker runs on one of its further hosts. `leader`: the URL of its control process."""
    arguments = (*process.arguments, "--node", str(node), "--leader", leader)
    return process._replace(name=f"{process.name}.{node}", arguments=arguments, node=node, nodes=nodes)


def _free_port(host: str) -> int:
    """Raises `LaunchError`."""
    try:
        with socket.create_server((host, 0)) as listener:
            port: int = listener.getsockname()[1]
            return port
    except OSError as error:
        raise LaunchError(f"no port can be had at {host}: {error.strerror or error}") from error

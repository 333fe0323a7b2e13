"""The part of `deploy.launchers.ray` that runs on the nodes: an actor for each worker, or for what of it is on a node,
which owns its processes.

The actor adds nothing to the worker but a place: it starts the control process as `baton up` would on its own machine,
tells of its end, and hands out its log. The worker can't outlive it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cluster.process import EXIT_DONE
from cluster.tasks import cancel
from deploy.launchers.local import LocalProcesses
from deploy.launchers.processes import ProcessSpec
from deploy.log_files import log_file

LOG_WAIT_SECONDS = 1.0
"""How long a reader waits for something new: a call each second for a worker that says nothing."""
LOG_CHUNK_BYTES = 256 * 1024

_POLL_SECONDS = 0.1
_GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"


class Parcel(NamedTuple):
    """What a worker needs of the machine where `baton up` runs. Goes as an argument of an actor, which is shown
    nowhere: not in Ray's logs, its dashboard or its lists, and not in any process's arguments."""

    topology: str
    """YAML."""
    environment: Mapping[str, str]
    """The cluster's secret."""


class Seat(NamedTuple):
    """What Ray has given to one rank."""

    address: str
    """Of the node, for other nodes."""
    node: str
    """For people."""
    gpus: Sequence[str]
    started_ns: int
    """The node's clock, before anything of the worker runs."""
    pid: int


class RankSeat:
    """An actor that holds what one further rank of a worker needs, and uses nothing of it itself."""

    async def seat(self) -> Seat:
        return _take_seat()


class WorkerHost:
    """An actor; called by one `RayProcesses`."""

    def __init__(self, parcel: Parcel) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="baton-ray-"))
        self._parcel = parcel
        self._processes: LocalProcesses | None = None
        self._log: Path | None = None
        self._stopped = asyncio.Event()
        self._over = False

    async def seat(self) -> Seat:
        return _take_seat()

    async def free_port(self) -> int:
        """That nobody listens on now, at any of this node's addresses."""
        with socket.create_server(("", 0)) as listener:
            port: int = listener.getsockname()[1]
            return port

    async def run(self, spec: ProcessSpec, gpus: Sequence[str]) -> int:
        """Runs the worker to its end; returns its exit code, also that of one who was stopped. `gpus`: of all ranks
        here. Raises `LaunchError` if it can't be started."""
        topology = self._directory / "topology.yaml"
        topology.write_text(self._parcel.topology)
        environment = dict(self._parcel.environment)
        if gpus:
            environment[_GPUS_VARIABLE] = ",".join(gpus)
        self._processes = LocalProcesses(self._directory, ("--topology", str(topology)), environment)
        try:
            return await self._until_end(self._processes, spec)
        finally:
            self._over = True

    async def _until_end(self, processes: LocalProcesses, spec: ProcessSpec) -> int:
        if self._stopped.is_set():
            return EXIT_DONE
        self._log = log_file(self._directory, spec.name)
        await processes.start(spec)
        ending = asyncio.ensure_future(processes.next_exit())
        stopping = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait({ending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return ending.result().code if ending.done() else EXIT_DONE
        finally:
            await cancel(ending, stopping)

    async def stop(self, name: str, grace_seconds: float) -> None:
        """Returns when the worker and all that it has started are gone."""
        if self._processes is not None:
            await self._processes.stop([name], grace_seconds)
        self._stopped.set()

    async def read_log(self, position: int) -> bytes | None:
        """The log from there on: what there is, a chunk at a time, or nothing if nothing comes for a while. None: there
        is no more, and none will come."""
        deadline = time.monotonic() + LOG_WAIT_SECONDS
        while True:
            over = self._over  # before the look: what is written until then is seen by it
            found = _read(self._log, position)
            if found or time.monotonic() > deadline:
                return found
            if over:
                return None
            await asyncio.sleep(_POLL_SECONDS)

    async def close(self) -> None:
        """The last call."""
        shutil.rmtree(self._directory, ignore_errors=True)


def _read(log: Path | None, position: int) -> bytes:
    if log is None or not log.exists():
        return b""
    with log.open("rb") as file:
        file.seek(position)
        return file.read(LOG_CHUNK_BYTES)


def _take_seat() -> Seat:
    import ray

    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    address = ray.util.get_node_ip_address()
    return Seat(address, f"{socket.gethostname()} ({address})", gpus, time.time_ns(), os.getpid())

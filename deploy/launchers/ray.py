"""A Ray cluster as a place for workers: each is an actor with the resources that the topology reserves for it.

Bootstrap and router run beside `baton up`, on its own machine, which is a node of the Ray cluster (with KubeRay the
head's pod, or a job's): so they have an address that clients know, and workers on any node can reach. The session
supervises the workers as it does local ones: it is never Ray that starts one again (`max_restarts=0`), but always Ray
that finds its place, so that the workers of a lost node come back on another one as soon as one has room. A worker
whose ranks are on several nodes has an actor on each, and the end of any is the end of the worker.

What a worker prints is copied to NAME.log in the run directory while it runs: it is there after its node's end, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import LaunchError
from cluster.messages import Role
from cluster.tasks import cancel
from deploy.launchers.base import ProcessKind
from deploy.launchers.local import LocalProcesses
from deploy.launchers.processes import ProcessExit, ProcessSpec, ProcessStatus
from deploy.launchers.ray_host import Parcel, RankSeat, Seat, WorkerHost
from deploy.launchers.ray_topology import Need
from deploy.launchers.spread import host_of
from deploy.log_files import log_file, tail

CALL_SECONDS = 10.0
"""For an actor to answer what takes no time."""

_WORKERS = {ProcessKind.PREFILL: Role.PREFILL, ProcessKind.DECODE: Role.DECODE}


class _Part(NamedTuple):
    """What of a worker runs on one node."""

    process: ProcessSpec
    host: Any
    gpus: Sequence[str]


class _Life:
    """One worker from its start to its end."""

    def __init__(
        self, hosts: Sequence[Any], need: Need, group: PlacementGroup | None = None, seats: Sequence[Any] = ()
    ) -> None:
        self.hosts = hosts
        """An actor on each of its nodes; the first has the control process."""
        self.need = need
        self.group = group
        self.seats = seats
        """Actors of the further ranks on one node."""
        self.seat: Seat | None = None
        """None: Ray has not found a place yet."""
        self.over = False
        self.stopping = False
        self.task: asyncio.Task[None] | None = None

    def release(self) -> None:
        for actor in (*self.hosts, *self.seats):
            with contextlib.suppress(RayError):
                ray.kill(actor)
        if self.group is not None:
            remove_placement_group(self.group)


class RayProcesses:
    """A `ProcessRunner`. Needs a connection to Ray, which belongs to the caller."""

    def __init__(
        self,
        directory: Path,
        common: Sequence[str],
        needs: Mapping[Role, Need],
        parcel: Parcel,
        scheme: str = "http",
    ) -> None:
        """`common`: arguments of every process that runs on this machine. `scheme`: of the workers' URLs."""
        self._directory = directory
        self._scheme = scheme
        self._needs = needs
        self._parcel = parcel
        self._exits: asyncio.Queue[ProcessExit] = asyncio.Queue()
        self._local = LocalProcesses(directory, common, exits=self._exits)
        self._lives: dict[str, _Life] = {}

    async def start(self, process: ProcessSpec) -> None:
        if process.kind not in _WORKERS:
            await self._local.start(process)
            return
        with log_file(self._directory, process.name).open("ab" if process.name in self._lives else "wb"):
            pass  # from now on it has a log, though an empty one
        try:
            life = self._lives[process.name] = _reserve(self._needs[_WORKERS[process.kind]], self._parcel)
        except (RayError, ValueError) as error:  # Ray is gone, or knows no such amount: 1.5 GPUs
            raise LaunchError(f"{process.name} can't be started: {error}") from error
        life.task = asyncio.create_task(self._live(process, life))

    async def stop(self, names: Sequence[str], grace_seconds: float) -> None:
        lives = {name: self._lives[name] for name in names if name in self._lives}
        endings = [_end(name, life, grace_seconds) for name, life in lives.items()]
        await asyncio.gather(self._local.stop(names, grace_seconds), *endings)

    async def next_exit(self) -> ProcessExit:
        return await self._exits.get()

    def status(self) -> list[ProcessStatus]:
        return self._local.status() + [self._status(name, life) for name, life in self._lives.items()]

    def log_tail(self, name: str, lines: int) -> list[str]:
        return tail(log_file(self._directory, name), lines)

    def _status(self, name: str, life: _Life) -> ProcessStatus:
        log = str(log_file(self._directory, name))
        if life.seat is None:
            return ProcessStatus(name, running=not life.over, log=log, waiting_for=str(life.need))
        instance = f"{life.seat.pid}@{life.seat.started_ns}"
        return ProcessStatus(name, not life.over, log, instance, life.seat.node, life.seat.started_ns)

    async def _live(self, process: ProcessSpec, life: _Life) -> None:
        try:
            end = await self._run(process, life)
        except RayError as error:
            end = ProcessExit(process.name, -signal.SIGKILL, lost=_reason(error))
        finally:
            life.over = True
            life.release()
        if not life.stopping:
            self._exits.put_nowait(end)

    async def _run(self, process: ProcessSpec, life: _Life) -> ProcessExit:
        """The first end of any part. Raises `RayError` if an actor or its node is lost."""
        parts = await self._placed(process, life)
        running = [asyncio.ensure_future(self._run_part(part)) for part in parts]
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            part, code = next((part, each.result()) for part, each in zip(parts, running, strict=True) if each.done())
        finally:
            await cancel(*running)
        if part is parts[0]:
            return ProcessExit(process.name, code)
        return ProcessExit(process.name, -signal.SIGKILL, lost=str(ProcessExit(part.process.name, code)))

    async def _placed(self, process: ProcessSpec, life: _Life) -> list[_Part]:
        """Waits until Ray has found a place for all of it."""
        seats = [await host.seat.remote() for host in life.hosts]
        further = [await each.seat.remote() for each in life.seats]
        first = life.seat = seats[0]._replace(node=", ".join(seat.node for seat in seats))
        arguments = (*process.arguments, "--host", first.address)
        gpus = [gpu for each in (first, *further) for gpu in each.gpus]
        if len(seats) == 1:
            return [_Part(process._replace(arguments=arguments), life.hosts[0], gpus)]
        port = await life.hosts[0].free_port.remote()
        leader = f"{self._scheme}://{first.address}:{port}"
        parts = [_Part(process._replace(arguments=(*arguments, "--port", str(port))), life.hosts[0], gpus)]
        for node, (host, seat) in enumerate(zip(life.hosts[1:], seats[1:], strict=True), 1):
            spec = host_of(process, node, len(seats), leader)
            parts.append(_Part(spec._replace(arguments=(*spec.arguments, "--host", seat.address)), host, seat.gpus))
        return parts

    async def _run_part(self, part: _Part) -> int:
        """Its exit code. Raises `RayError`."""
        copying = asyncio.ensure_future(self._copy_log(part.process.name, part.host))
        try:
            code: int = await part.host.run.remote(part.process, part.gpus)
            await asyncio.wait({copying}, timeout=CALL_SECONDS)  # for its last words
            await part.host.close.remote()
        finally:
            await cancel(copying)
        return code

    async def _copy_log(self, name: str, host: Any) -> None:
        """Until the worker has ended and all is copied, or the actor is lost."""
        position = 0
        with log_file(self._directory, name).open("ab", buffering=0) as copy:
            while (chunk := await host.read_log.remote(position)) is not None:
                position += copy.write(chunk)


async def _end(name: str, life: _Life, grace_seconds: float) -> None:
    life.stopping = True
    if life.task is None or life.over:
        return
    if life.seat is None:
        life.task.cancel()
    else:
        with contextlib.suppress(RayError, asyncio.TimeoutError):
            await asyncio.wait_for(life.hosts[0].stop.remote(name, grace_seconds), grace_seconds + CALL_SECONDS)
    await asyncio.wait({life.task}, timeout=2 * CALL_SECONDS)
    await cancel(life.task)


def _reserve(need: Need, parcel: Parcel) -> _Life:
    """Actors that wait for their places: all of one worker on one node, or on as many as it needs."""
    host, seat = ray.remote(WorkerHost), ray.remote(RankSeat)
    if need.ranks == 1:
        # Spread: with one node, a pool should not lose all of its workers.
        return _Life([host.options(**_options(need.bundle), scheduling_strategy="SPREAD").remote(parcel)], need)
    bundles = need.bundles
    group = placement_group(
        [dict(each) for each in bundles], strategy="STRICT_PACK" if need.nodes == 1 else "STRICT_SPREAD"
    )
    places = [
        {
            **_options(each),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=at),
        }
        for at, each in enumerate(bundles)
    ]
    hosts = [host.options(**place).remote(parcel) for place in places[: need.nodes]]
    seats = [seat.options(**place).remote() for place in places[need.nodes :]]
    return _Life(hosts, need, group, seats)


def _options(bundle: Mapping[str, float]) -> dict[str, Any]:
    """Of an actor that takes so much."""
    return {
        "num_cpus": bundle.get("CPU", 0.0),
        "num_gpus": bundle.get("GPU", 0.0),
        "resources": {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")},
        "max_restarts": 0,
    }


def _reason(error: RayError) -> str:
    """Ray's words, without the traceback and the ids."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

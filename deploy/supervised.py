"""The `Cluster` whose processes a `Session` of this process supervises: on this machine, or on Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from cluster.clock import Clock
from cluster.config import Topology
from cluster.errors import LaunchError, NotFound
from cluster.messages import Role
from cluster.tasks import cancel
from deploy.launchers.base import ProcessKind, Replica, Sizes
from deploy.log_files import log_file, read_log
from deploy.plan import worker
from deploy.pools import Change, change, require_sizes
from deploy.replicas import Seen, member_of, replicas
from deploy.rolling import POLL_SECONDS
from deploy.session import GRACE_SECONDS, Probe, Session

WORKERS = (ProcessKind.PREFILL, ProcessKind.DECODE)


class Placement(Protocol):
    """The workers as `deploy.cluster_client.RouterClient` sees them."""

    async def takes_work(self, worker: str, epoch: int) -> bool: ...


class Supervised(NamedTuple):
    """A cluster of this process, and what is needed to operate it."""

    topology: Topology
    """As its processes read it."""
    session: Session
    probe: Probe
    router: Placement
    directory: Path
    """With the logs."""
    clock: Clock


class SupervisedLauncher:
    """A `Launcher`. What it has brought up lives as long as its session, which the caller stops in any case."""

    def __init__(self, supervised: Supervised, tell: Callable[[str], None]) -> None:
        self._supervised = supervised
        self._tell = tell

    async def start(self, timeout_seconds: float) -> SupervisedCluster:
        await self._supervised.session.start(timeout_seconds)
        return SupervisedCluster(self._supervised, timeout_seconds, self._tell)

    def cluster_for(self, tell: Callable[[str], None], patience_seconds: float) -> SupervisedCluster:
        """The same cluster for one more caller, who is told apart from the others what is done for him."""

        def tell_both(line: str) -> None:
            self._tell(line)
            tell(line)

        return SupervisedCluster(self._supervised, patience_seconds, tell_both)


class SupervisedCluster:
    """A `Cluster`. Several may share a session, for callers who want to be told separately."""

    def __init__(self, supervised: Supervised, patience_seconds: float, tell: Callable[[str], None]) -> None:
        """`patience_seconds`: how long new workers may take to be ready."""
        self._topology, self._session, self._probe, self._router, self._directory, self._clock = supervised
        self._patience = patience_seconds
        self._tell = tell

    async def status(self) -> list[Replica]:
        roster, healthy = await self._probe()
        session = self._session
        return replicas(session.specs, session.processes(), session.leaving, Seen(roster, healthy))

    async def scale(self, sizes: Sizes) -> None:
        require_sizes(self._topology, sizes)
        async with self._session.changing:
            changes = {role: self._change(role, size) for role, size in sizes.items()}
            parts = [self._grow(role, change.start) for role, change in changes.items()]
            parts += [self._retire(change.retire) for change in changes.values()]
            # All of them to their end: that one pool can't grow is no reason to leave another half done.
            for result in await asyncio.gather(*parts, return_exceptions=True):
                if result is not None:
                    raise result

    async def drain(self, workers: Sequence[str]) -> None:
        async with self._session.changing:
            self._require_known(workers)
            await self._retire(list(workers))

    async def restart(self, workers: Sequence[str]) -> None:
        async with self._session.changing:
            self._require_known(workers)
            for name in workers or self._workers():
                begun = self._clock.now()
                self._tell(f"{name} is draining")
                await self._session.start_anew(name, self._grace)
                await self._wait_ready([name])
                self._tell(f"{name} takes work again, after {self._clock.now() - begun:.1f} s")

    async def logs(self, name: str, lines: int, *, follow: bool) -> AsyncGenerator[str, None]:
        if name not in {spec.name for spec in self._session.specs}:
            raise NotFound(f"nothing of the name {name} runs here; known: {self._known()}")
        async for line in read_log(log_file(self._directory, name), lines, follow=follow):
            yield line

    async def stop(self, grace_seconds: float) -> None:
        await self._session.stop(grace_seconds)

    # --- pools -------------------------------------------------------------------------------------------------------

    @property
    def _grace(self) -> float:
        return GRACE_SECONDS + self._topology.worker.drain_seconds

    def _change(self, role: Role, size: int) -> Change:
        names = [spec.name for spec in self._session.specs if spec.kind.value == role.value]
        return change(role, [name for name in names if name not in self._session.leaving], names, size)

    async def _grow(self, role: Role, indices: Sequence[int]) -> None:
        """What does not come up is taken away again, for it would be tried for ever. Raises `LaunchError`."""
        specs = [worker(role, index) for index in indices]
        waiting = [spec.name for spec in specs]
        if not specs:
            return
        self._tell(f"starting {', '.join(waiting)}{self._crowding(role, indices)}")
        failure = await self._session.grow(specs)
        coming = asyncio.ensure_future(self._wait_ready(waiting))
        try:
            await asyncio.wait({coming, failure}, return_when=asyncio.FIRST_COMPLETED)
            (failure if failure.done() else coming).result()
        except LaunchError:
            await self._retire(waiting)
            raise
        finally:
            await cancel(coming, failure)

    async def _retire(self, names: Sequence[str]) -> None:
        for name in names:
            self._tell(f"{name} is draining")
        await self._session.retire(names, self._grace)
        for name in names:
            self._tell(f"{name} has ended")

    async def _wait_ready(self, waiting: list[str]) -> None:
        """Takes from `waiting` who takes work, until it is empty."""
        deadline = self._clock.now() + self._patience
        while True:
            roster, _ = await self._probe()
            processes = self._session.processes()
            for name in list(waiting):
                status = member_of(processes[name], roster or ()) if name in processes else None
                if status is None or not status.load.ready:
                    continue
                if await self._router.takes_work(name, status.member.epoch):
                    waiting.remove(name)
                    if self._session.settled(name):
                        self._tell(f"{name} takes work")
            if not waiting:
                return
            if self._clock.now() > deadline:
                raise LaunchError(await self._too_slow(waiting))
            await asyncio.sleep(POLL_SECONDS)

    async def _too_slow(self, waiting: Sequence[str]) -> str:
        reasons = {replica.name: replica.reason for replica in await self.status()}
        late = "; ".join(f"{name}: {reasons.get(name) or 'it is gone'}" for name in waiting)
        return f"not ready after {self._patience:g} s: {late}"

    def _crowding(self, role: Role, indices: Sequence[int]) -> str:
        """A word on cores that workers share, where the topology names cores for fewer."""
        pool = self._topology.prefill if role is Role.PREFILL else self._topology.decode
        if not pool.cpus or max(indices) < len(pool.cpus):
            return ""
        return f" ({role.value}.cpus names cores for {len(pool.cpus)}: the others share them in turn)"

    def _workers(self) -> list[str]:
        return [spec.name for spec in self._session.specs if spec.kind in WORKERS]

    def _require_known(self, names: Sequence[str]) -> None:
        unknown = [name for name in names if name not in self._workers()]
        if unknown:
            raise NotFound(f"there is no worker {', '.join(unknown)}; known: {', '.join(self._workers()) or 'none'}")

    def _known(self) -> str:
        return ", ".join(spec.name for spec in self._session.specs) or "none"

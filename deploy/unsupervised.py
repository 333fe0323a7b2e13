"""The `Cluster` of processes that were started one by one, by systemd or by hand: what its members do when asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from cluster.errors import LaunchError
from cluster.messages import Role
from deploy.launchers.base import ProcessKind, Replica, ReplicaState, Sizes
from deploy.rolling import Rolling, Workers


class UnsupervisedCluster:
    """A `Cluster`, as far as that goes: nobody here starts processes, or has their logs."""

    def __init__(self, workers: Workers, rolling: Rolling, missing: str) -> None:
        """`missing` says in what way nobody supervises it."""
        self._workers = workers
        self._rolling = rolling
        self._missing = missing

    async def status(self) -> list[Replica]:
        return [
            Replica(
                status.member.worker,
                ProcessKind.PREFILL if status.member.role is Role.PREFILL else ProcessKind.DECODE,
                ReplicaState.READY if status.load.ready else ReplicaState.STARTING,
                str(status.member.epoch),
                status.member.url,
                "" if status.load.ready else status.load.stalled or "it takes no work now",
            )
            for status in await self._workers.workers()
        ]

    async def scale(self, sizes: Sizes) -> None:
        raise LaunchError(f"{self._missing}: start and end workers where they are supervised")

    async def drain(self, workers: Sequence[str]) -> None:
        await self._rolling.drain(workers)

    async def restart(self, workers: Sequence[str]) -> None:
        await self._rolling.restart(workers)

    async def logs(self, name: str, lines: int, *, follow: bool) -> AsyncGenerator[str, None]:
        raise LaunchError(f"{self._missing}: the logs are where {name} was started")
        yield ""  # what makes this a generator

    async def stop(self, grace_seconds: float) -> None:
        raise LaunchError(f"{self._missing}: stop it where its processes were started")

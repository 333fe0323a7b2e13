"""Simulated workers: the real control process over simulated links, and the launcher that starts it anew."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from cluster.errors import WorkerLost
from cluster.messages import Role
from cluster.worker_shell import EngineCommand
from decode_worker import control as decode_control
from prefill_worker import control as prefill_control
from tests.sim.engines import EngineLife, SimEngineHost
from tests.sim.kernel import Strand

if TYPE_CHECKING:
    from tests.sim.cluster import SimCluster

LOADING_SECONDS = (0.5, 2.0)
"""Of a model, at each start of an engine process."""
RESTART_SECONDS = (0.1, 0.5)
"""Until the launcher has noticed that a worker ended."""


class SimWorker:
    """One worker of the topology, through all its lives."""

    def __init__(self, cluster: SimCluster, name: str, role: Role) -> None:
        self.cluster = cluster
        self.name = name
        self.role = role
        self.life: EngineLife | None = None
        """The engine process that was started last."""
        self.strand = Strand(f"{name} control", name)
        self._start()

    def _start(self) -> None:
        """The launcher starts the control process, which starts the engine process."""
        cluster = self.cluster
        self.strand = Strand(f"{self.name} control", self.name)
        with cluster.loop.running(self.strand):
            self.strand.asked_to_end = asyncio.Event()
            command: Any = EngineCommand(self._start_engine, self._loading, {})  # type: ignore[arg-type]
            serve = prefill_control.serve if self.role is Role.PREFILL else decode_control.serve
            serving = serve(cluster.topology, self.name, self.name, 0, command)
            cluster.loop.spawn(self.strand, self._run(serving, self.strand))

    async def _run(self, serving: Coroutine[Any, Any, int], strand: Strand) -> None:
        """The control process, until it has drained or given up; the launcher starts it anew."""
        try:
            await serving
        except WorkerLost as error:
            self.cluster.story.note(f"{self.name}: the control process ends: {error}")
        if strand.alive:
            self.kill()

    def _start_engine(self, host: SimEngineHost) -> EngineLife:
        self.life = EngineLife(host, self.cluster, self.name, self.role)
        return self.life

    def _loading(self) -> float:
        return self.cluster.random.uniform(*LOADING_SECONDS)

    @property
    def up(self) -> bool:
        return self.strand.alive and self.life is not None and self.life.alive

    def kill(self) -> None:
        """Both processes; the launcher starts the worker anew."""
        self.strand.alive = False
        if self.life is not None:
            self.life.die()
        self.cluster.network.process_died(self.name, self.strand)
        self.cluster.loop.at(self.cluster.random.uniform(*RESTART_SECONDS), None, self._start)

    def drain(self) -> None:
        """SIGTERM; when it has ended, the launcher starts it anew: a rolling restart."""
        with self.cluster.loop.running(self.strand):
            self.strand.asked_to_end.set()

"""What makes the faults: signals, and sockets taken hold of from outside. Nothing in the cluster helps."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import psutil

from bench.cluster import Cluster
from tests.fault.plan import Kind
from tests.fault.sockets import connections, cut, deafen, heal, other_ends

SECONDS = 5.0
"""How long what heals by itself lasts."""
AGAIN_SECONDS = 0.25
"""A worker that nothing shall reach may connect anew: so often its new sockets are made deaf, too."""


class Hands:
    """Does to the processes of one cluster what fate does to those of others."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._does: dict[Kind, Callable[[str], Awaitable[None]]] = {
            Kind.KILL_WORKER: self._kill,
            Kind.KILL_ROUTER: self._kill,
            Kind.KILL_BOOTSTRAP: self._kill,
            Kind.KILL_ENGINE: self._kill_engine,
            Kind.STOP_WORKER: lambda name: self._stop(self.pids(name)),
            Kind.STOP_ENGINE: lambda name: self._stop(self.pids(name)[1:]),
            Kind.CUT: self._cut,
            Kind.PARTITION: lambda name: self._silence(name, both_ways=True),
            Kind.DEAFEN: lambda name: self._silence(name, both_ways=False),
        }

    def pids(self, name: str) -> list[int]:
        """The process that the launcher has started, and all that it started itself; none while there is none."""
        pid = self._cluster.tree.pids().get(name)
        if pid is None:
            return []
        with suppress(psutil.NoSuchProcess):
            return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        return []

    async def strike(self, kind: Kind, name: str) -> None:
        """Returns when the fault is over; for a death, at once. The fault begins before the first wait."""
        await self._does[kind](name)

    async def _kill(self, name: str) -> None:
        _signal(self.pids(name), signal.SIGKILL)

    async def _kill_engine(self, name: str) -> None:
        _signal(self.pids(name)[1:], signal.SIGKILL)

    async def _stop(self, pids: list[int]) -> None:
        _signal(pids, signal.SIGSTOP)
        try:
            await asyncio.sleep(SECONDS)
        finally:
            _signal(pids, signal.SIGCONT)

    async def _cut(self, name: str) -> None:
        cut(connections(self.pids(name)))

    async def _silence(self, name: str, *, both_ways: bool) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + SECONDS
        everybody = [pid for member in self._cluster.tree.pids() for pid in self.pids(member)]
        try:
            while loop.time() < until:
                ends = connections(self.pids(name))
                deafen(ends)
                if both_ways:
                    deafen(other_ends(ends, connections(everybody)))
                await asyncio.sleep(AGAIN_SECONDS)
        finally:
            heal(connections(everybody))


def _signal(pids: list[int], number: signal.Signals) -> None:
    """To all of them that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

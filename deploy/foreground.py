"""A cluster of this machine in the foreground: it lives as long as what is done with it, or until a signal."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.console import Console

from cluster.clock import MonotonicClock
from cluster.config import Topology
from cluster.errors import LaunchError
from cluster.stop_signals import POLITE, StopSignals
from cluster.tasks import first_of
from cluster.topology import dump_topology
from deploy.cluster_client import RouterClient, ask_bootstrap, ask_router, observe
from deploy.display import make_display
from deploy.launchers.local import LocalProcesses
from deploy.plan import processes
from deploy.session import GRACE_SECONDS, Session
from deploy.supervision import Supervisor

Serve = Callable[[Session, RouterClient], Awaitable[None]]
"""What to do with a cluster that is ready."""

_STOP_SIGNALS = (*POLITE, signal.SIGHUP)


async def run_cluster(
    topology: Topology, log_directory: Path | None, start_timeout: float, console: Console, serve: Serve
) -> None:
    """Runs `serve` on a cluster of this machine that lives just as long. A stop signal ends it early, without error."""
    directory = _run_directory(log_directory)
    topology_file = _write_topology(directory, topology)
    console.print(f"logs: {directory}", markup=False, highlight=False, soft_wrap=True)
    async with (
        ask_router(topology.router, topology.security) as router,
        ask_bootstrap(topology.bootstrap, topology.security) as bootstrap,
    ):
        session = Session(
            processes(topology, topology_file),
            LocalProcesses(directory),
            lambda: observe(bootstrap, router),
            make_display(console),
            MonotonicClock(),
            Supervisor(topology.restarts),
        )

        async def live() -> None:
            await session.start(start_timeout)
            await serve(session, router)

        with StopSignals(_STOP_SIGNALS) as signals:
            try:
                await first_of(asyncio.ensure_future(live()), asyncio.ensure_future(signals.wait()))
            finally:
                console.print("stopping", highlight=False)
                grace = GRACE_SECONDS + max(topology.router.drain_seconds, topology.worker.drain_seconds)
                await _stop(session, signals, grace)


async def _stop(session: Session, signals: StopSignals, grace_seconds: float) -> None:
    """Stops the cluster in order; a further stop signal ends the politeness."""
    impatience = asyncio.ensure_future(signals.wait())
    await first_of(asyncio.ensure_future(session.stop(grace_seconds)), impatience)
    await session.stop(grace_seconds=0)


def _run_directory(wanted: Path | None) -> Path:
    try:
        if wanted is None:
            return Path(tempfile.mkdtemp(prefix="baton-"))
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"can't make the log directory: {error}") from error
    return wanted


def _write_topology(directory: Path, topology: Topology) -> str:
    """What the processes read: one file in which all is decided, so that none of them decides otherwise."""
    path = directory / "topology.yaml"
    try:
        path.write_text(dump_topology(topology))
    except OSError as error:
        raise LaunchError(f"can't write to the log directory: {error}") from error
    return str(path)

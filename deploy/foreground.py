"""A supervised cluster in the foreground: it lives as long as what is done with it, or until somebody ends it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from cluster.clock import MonotonicClock
from cluster.config import Topology
from cluster.stop_signals import POLITE, StopSignals
from cluster.tasks import first_of
from deploy.cluster_client import RouterClient, ask_bootstrap, ask_router, observe
from deploy.control import listening
from deploy.display import make_display
from deploy.launchers.processes import ProcessRunner
from deploy.places import open_place
from deploy.plan import processes
from deploy.preflight import prepare
from deploy.run_directory import Running, announced, make_run_directory, write_topology
from deploy.session import GRACE_SECONDS, Session
from deploy.supervised import Supervised, SupervisedLauncher
from deploy.supervision import Supervisor

Serve = Callable[[Topology, Session, RouterClient], Awaitable[None]]
"""What to do with a cluster that is ready; the topology is the one that its processes read."""

_STOP_SIGNALS = (*POLITE, signal.SIGHUP)


async def run_cluster(
    topology: Topology, log_directory: Path | None, start_timeout: float, console: Console, serve: Serve
) -> None:
    """Runs `serve` on a cluster that lives just as long. A stop signal ends it early, without error.

    Raises `ConfigError` and `LaunchError` for what can't be started, and what `serve` raises.
    """
    with open_place(topology) as place:
        topology = prepare(place.topology)
        directory = make_run_directory(log_directory)
        runner = place.make_runner(directory, write_topology(directory, topology))
        console.print(f"logs: {directory}", markup=False, highlight=False, soft_wrap=True)
        for note in place.notes:
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        with announced(topology.bootstrap.port, directory) as running:
            await _run(topology, runner, running, start_timeout, console, serve)


async def _run(
    topology: Topology,
    runner: ProcessRunner,
    running: Running,
    start_timeout: float,
    console: Console,
    serve: Serve,
) -> None:
    display, clock = make_display(console), MonotonicClock()
    async with (
        ask_router(topology.router, topology.security) as router,
        ask_bootstrap(topology.bootstrap, topology.security) as bootstrap,
    ):
        probe = partial(observe, bootstrap, router)
        session = Session(processes(topology), runner, probe, display, clock, Supervisor(topology.restarts))
        supervised = Supervised(topology, session, probe, router, running.directory, clock)
        launcher = SupervisedLauncher(supervised, display.tell)

        async def live() -> None:
            await launcher.start(start_timeout)
            async with listening(launcher.cluster_for, running.socket):
                await serve(topology, session, router)

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

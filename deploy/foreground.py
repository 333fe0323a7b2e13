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
from cluster.topology import dump_topology
from deploy.cluster_client import RouterClient, ask_bootstrap, ask_router, observe
from deploy.display import make_display
from deploy.launchers.local import LocalLauncher
from deploy.plan import processes
from deploy.session import Session

Serve = Callable[[Session, RouterClient], Awaitable[None]]
"""What to do with a cluster that is ready."""

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
            LocalLauncher(directory),
            lambda: observe(bootstrap, router),
            make_display(console),
            MonotonicClock(),
        )

        async def live() -> None:
            await session.start(start_timeout)
            await serve(session, router)

        with StopSignals() as signals:
            try:
                await first_of(asyncio.ensure_future(live()), asyncio.ensure_future(signals.wait()))
            finally:
                console.print("stopping", highlight=False)
                await _stop(session, signals)


async def _stop(session: Session, signals: StopSignals) -> None:
    """Stops the cluster in order; a further stop signal ends the politeness."""
    impatience = asyncio.ensure_future(signals.wait())
    await first_of(asyncio.ensure_future(session.stop()), impatience)
    await session.stop(grace_seconds=0)


async def first_of(*tasks: asyncio.Future[None]) -> None:
    """Waits for the first of `tasks` to end, cancels the others, and raises what it raised."""
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP as something to wait for, one at a time."""

    def __init__(self) -> None:
        self._received: asyncio.Queue[None] = asyncio.Queue()

    async def wait(self) -> None:
        await self._received.get()

    def __enter__(self) -> StopSignals:
        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._received.put_nowait, None)
        return self

    def __exit__(self, *exception: object) -> None:
        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)


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

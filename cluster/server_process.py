"""Starting an asyncio process: arguments, logs, the event loop, one place where errors become an exit status."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence

import uvloop

from cluster.config import Topology
from cluster.errors import BatonError
from cluster.logging import configure, get_logger
from cluster.topology import load_topology

log = get_logger(__name__)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def topology_parser(program: str, what: str) -> argparse.ArgumentParser:
    """The arguments that every process has."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=what)
    parser.add_argument("--topology", required=True, help="the cluster's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides one of its settings")
    return parser


def worker_parser(program: str, what: str) -> argparse.ArgumentParser:
    """The arguments of a worker's control process."""
    parser = topology_parser(program, what)
    parser.add_argument("--index", type=int, default=0, help="which replica of the pool this is (default: 0)")
    parser.add_argument("--name", help="its name in the cluster (default: ROLE-INDEX)")
    parser.add_argument("--host", help="address to listen on, reachable by the others (default: the topology's)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: any free one)")
    return parser


def run(process: str, topology_path: str, overrides: Sequence[str], main: Callable[[Topology], Awaitable[None]]) -> int:
    """Loads the topology and runs `main` on an event loop. Returns the exit status: 0, or 1 after logging an error."""
    try:
        topology = load_topology(topology_path, overrides)
    except BatonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    configure(process, topology.logging)
    try:
        uvloop.run(_awaiting(main(topology)))
    except BatonError as error:
        log.error("stopped", error=str(error), kind=type(error).__name__)
        return 1
    except Exception:
        log.exception("stopped by a defect", error="see the traceback")
        return 1
    return 0


async def _awaiting(main: Awaitable[None]) -> None:
    await main


async def run_until_stopped(*tasks: asyncio.Task[None]) -> None:
    """Waits for SIGTERM, SIGINT or the first of `tasks` to end; cancels the others, raises what that one raised."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopping}:
            task.result()
    finally:
        for task in (stopping, *tasks):
            task.cancel()
        await asyncio.gather(stopping, *tasks, return_exceptions=True)

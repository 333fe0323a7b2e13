"""Starting an asyncio process: arguments, logs, the event loop, one place where errors become an exit status."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence

import uvloop

from cluster.config import Topology
from cluster.errors import BatonError
from cluster.logging import configure, get_logger
from cluster.process import EXIT_DONE, forget_garbage
from cluster.stop_signals import StopSignals
from cluster.tasks import first_of
from cluster.topology import load_topology

log = get_logger(__name__)


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
    parser.add_argument("--host", help="address at which the others reach it (default: the topology's)")
    parser.add_argument("--listen", help="address to listen on, if that is another: 0.0.0.0 in a container")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: any free one)")
    parser.add_argument("--node", type=int, default=0, help="which of its hosts this is (default: 0, the first)")
    parser.add_argument("--leader", metavar="URL", help="of its process on the first host; needed on all others")
    return parser


Main = Callable[[Topology], Awaitable[int | None]]
"""What a process does; its exit status, 0 for None."""


def run(process: str, topology_path: str, overrides: Sequence[str], main: Main) -> int:
    """Loads the topology and runs `main` on an event loop. Returns the exit status: `main`'s, or 1 after logging an
    error, or 2 for a topology that is wrong."""
    try:
        topology = load_topology(topology_path, overrides)
    except BatonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    configure(process, topology.logging)
    forget_garbage()
    try:
        return uvloop.run(_awaiting(main(topology))) or EXIT_DONE
    except BatonError as error:
        log.error("stopped", error=str(error), kind=type(error).__name__)
        return 1
    except Exception:
        log.exception("stopped by a defect", error="see the traceback")
        return 1


async def _awaiting(main: Awaitable[int | None]) -> int | None:
    return await main


async def run_until_stopped(*tasks: asyncio.Future[None], leave: Callable[[], None] | None = None) -> None:
    """Waits for the first of `tasks` to end; cancels the others, raises what that one raised.

    SIGTERM or SIGINT calls `leave`, which must lead to such an end; a second one, or the first where there is no
    `leave`, cancels them all.
    """

    async def stop(signals: StopSignals) -> None:
        await signals.wait()
        if leave is not None:
            leave()
            await signals.wait()

    with StopSignals() as signals:
        await first_of(asyncio.ensure_future(stop(signals)), *tasks)

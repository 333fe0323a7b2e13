"""`python -m bootstrap --topology FILE`: the bootstrap service."""

from __future__ import annotations

import asyncio
import sys

from aiohttp import web

from bootstrap.server import BootstrapServer
from cluster.clock import MonotonicClock
from cluster.config import Topology
from cluster.errors import ConfigError
from cluster.logging import get_logger
from cluster.server_process import run, run_until_stopped, topology_parser

log = get_logger("bootstrap")


async def serve(topology: Topology) -> None:
    """Serves until SIGTERM or SIGINT. Raises `ConfigError` if the port is taken."""
    config = topology.bootstrap
    runner = web.AppRunner(
        BootstrapServer(config, MonotonicClock()).application(), access_log=None, shutdown_timeout=1.0
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, config.host, config.port).start()
    except OSError as error:
        raise ConfigError(
            f"can't listen on {config.host}:{config.port}: {error.strerror or error}; set bootstrap.port to a free one"
        ) from error
    log.info("listening", url=topology.bootstrap_url)
    try:
        await run_until_stopped(asyncio.create_task(_forever()))
    finally:
        await runner.cleanup()


async def _forever() -> None:
    await asyncio.Event().wait()


def main() -> int:
    arguments = topology_parser(
        "bootstrap", "Introduces the workers and routers of a cluster to each other."
    ).parse_args()
    return run("bootstrap", arguments.topology, arguments.set, serve)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bootstrap --topology FILE`: the bootstrap service."""

from __future__ import annotations

import asyncio
import sys

from bootstrap.server import BootstrapServer
from cluster.access.security import ClusterSecurity
from cluster.clock import MonotonicClock
from cluster.config import Topology
from cluster.http_server import HttpServer, PortLimits
from cluster.logging import get_logger
from cluster.server_process import run, run_until_stopped, topology_parser

log = get_logger("bootstrap")

SHUTDOWN_SECONDS = 1.0
CONNECTIONS = 16384
"""Each worker keeps one, a prefill worker another, for the roster; so does each router."""


async def serve(topology: Topology) -> None:
    """Serves until SIGTERM or SIGINT. Raises `ConfigError` if the port is taken."""
    config = topology.bootstrap
    security = ClusterSecurity(topology.security)
    security.require_for(config.host, "bootstrap.host")
    bootstrap = BootstrapServer(config, MonotonicClock())
    application = bootstrap.application()
    security.guard(application, bootstrap.unauthorized)
    server = HttpServer(application, SHUTDOWN_SECONDS, security.server_tls, PortLimits(connections=CONNECTIONS))
    try:
        url = await server.start(config.host, config.port, "set bootstrap.port to a free one")
        log.info("listening", url=url)
        await run_until_stopped(asyncio.create_task(_forever()))
    finally:
        await server.stop()


async def _forever() -> None:
    await asyncio.Event().wait()


def main() -> int:
    arguments = topology_parser(
        "bootstrap", "Introduces the workers and routers of a cluster to each other."
    ).parse_args()
    return run("bootstrap", arguments.topology, arguments.set, serve)


if __name__ == "__main__":
    sys.exit(main())

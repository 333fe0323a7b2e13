"""The control process of a decode worker: accepts the prefill workers that dial it, and relays."""

from __future__ import annotations

import asyncio

from aiohttp import web

from bootstrap.client import Registration
from cluster.config import Topology
from cluster.errors import Draining, ProtocolError
from cluster.links import LinkClosed, accept
from cluster.logging import get_logger
from cluster.messages import Member, Refused, Role
from cluster.peers import addressed, receive_hello, require_compatible
from cluster.server_process import run_until_stopped
from cluster.worker_shell import EngineCommand, WorkerShell

log = get_logger(__name__)


class PeerListener:
    """Serves `/peer`: one link for each prefill worker that fits us."""

    def __init__(self, shell: WorkerShell) -> None:
        self._worker = shell.name
        self._peers = shell.peers
        self._metrics = shell.metrics
        shell.app.router.add_get("/peer", self._serve)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        link = await accept(request)
        try:
            theirs = await receive_hello(link, Role.PREFILL)
            ours = self._peers.ours
            if ours is None:
                raise Draining(f"{self._worker} has no engine process yet")
            require_compatible(ours, theirs)
            link.post(addressed(ours, theirs.epoch))
            await self._peers.relay(ours, theirs, link)
        except LinkClosed:
            pass
        except (ProtocolError, Draining) as error:
            log.error("refused a peer", peer=link.peer, error=str(error))
            self._metrics.refused("peer")
            link.post(Refused(error.to_info()))
        finally:
            await link.close()
        return web.Response()


async def serve(
    topology: Topology, name: str, host: str, port: int, command: EngineCommand, *, listen: str | None = None
) -> int:
    """Runs the worker until it is drained, by SIGTERM, SIGINT or over HTTP. Returns its exit status.

    The others reach it at `host`, where it also listens unless `listen` names another address of this machine.

    Raises `ConfigError` if it can't start and `WorkerLost` when its engine process dies again and again.
    """
    shell = WorkerShell(name, Role.DECODE, topology, command)
    PeerListener(shell)

    def join(member: Member) -> Registration:
        return Registration(session, topology.bootstrap_url, member, shell.load)

    async with shell.security.session() as session:
        try:
            await shell.listen(host, port, listen)
            await run_until_stopped(asyncio.ensure_future(shell.run(join)), leave=shell.ask_drain)
        finally:
            await shell.close()
    return shell.exit_code

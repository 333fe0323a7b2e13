"""The control process of a decode worker: accepts the prefill workers that dial it, and relays."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from aiohttp import web

from bootstrap.client import Registration
from cluster.config import Topology
from cluster.errors import Draining, ProtocolError
from cluster.links import LinkClosed, accept
from cluster.logging import get_logger
from cluster.messages import Refused, Role
from cluster.peers import PeerTable, receive_hello, require_compatible
from cluster.server_process import run_until_stopped
from cluster.worker_shell import WorkerShell

log = get_logger(__name__)


class PeerListener:
    """Serves `/peer`: one link for each prefill worker that fits us."""

    def __init__(self, shell: WorkerShell, peers: PeerTable) -> None:
        self._shell = shell
        self._peers = peers
        shell.app.router.add_get("/peer", self._serve)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        link = await accept(request)
        try:
            theirs = await receive_hello(link, Role.PREFILL)
            if self._shell.member is None:
                raise Draining(f"{self._shell.name} is still starting")
            ours = self._shell.hello()
            require_compatible(ours, theirs)
            link.post(ours)
            await self._peers.relay(theirs, link)
        except LinkClosed:
            pass
        except (ProtocolError, Draining) as error:
            log.error("refused a peer", peer=link.peer, error=str(error))
            self._shell.metrics.refused("peer")
            link.post(Refused(error.to_info()))
        finally:
            await link.close()
        return web.Response()


async def serve(
    topology: Topology, name: str, host: str, port: int, engine: Sequence[str], env: Mapping[str, str]
) -> None:
    """Runs the worker until SIGTERM or SIGINT; `engine` are its engine process's arguments, `env` its environment.

    Raises `ConfigError` if it can't start and `WorkerLost` when its engine process dies.
    """
    shell = WorkerShell(name, Role.DECODE, topology)
    peers = PeerTable(shell.post, shell.metrics.peers)
    shell.on_peer_message = peers.send
    PeerListener(shell, peers)
    async with shell.security.session() as session:
        try:
            member = await shell.start(host, port, "decode_worker.engine_process", engine, env)
            registration = Registration(session, topology.bootstrap_url, member, lambda: shell.load)
            relaying = [shell.run(), registration.run()]
            await run_until_stopped(*(asyncio.create_task(part) for part in relaying))
            await registration.leave("stopped")
        finally:
            await peers.close()
            await shell.close()

"""The control process of a prefill worker: dials every decode worker that bootstrap knows, and relays."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import aiohttp

from bootstrap.client import Registration, RosterWatcher
from cluster.config import Topology
from cluster.errors import AvailabilityError, ProtocolError
from cluster.links import Backoff, LinkClosed, dial
from cluster.logging import get_logger
from cluster.messages import Member, Role
from cluster.peers import PeerTable, receive_hello, require_compatible
from cluster.server_process import run_until_stopped
from cluster.worker_shell import WorkerShell

log = get_logger(__name__)

REFUSED_SECONDS = 10.0
"""Between two tries with a peer that does not fit us; only a new epoch of it can help."""


class PeerDialer:
    """Keeps a link to each decode worker of the roster; one task per instance while it is wanted or linked."""

    def __init__(self, shell: WorkerShell, session: aiohttp.ClientSession, peers: PeerTable) -> None:
        self._shell = shell
        self._session = session
        self._peers = peers
        self._wanted: dict[str, int] = {}
        """Epoch of the instance that the roster has, by worker."""
        self._tasks: dict[tuple[str, int], asyncio.Task[None]] = {}

    def on_change(self, joined: list[Member], left: list[Member]) -> None:
        """The roster's callback. An instance that bootstrap lost sight of keeps its link until that ends by itself."""
        for member in left:
            if self._wanted.get(member.worker) == member.epoch:
                del self._wanted[member.worker]
        for member in joined:
            if member.role is Role.DECODE:
                self._wanted[member.worker] = member.epoch
                self._start(member)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, member: Member) -> None:
        key = (member.worker, member.epoch)
        if key not in self._tasks:
            task = self._tasks[key] = asyncio.create_task(self._keep(member), name=f"peer {member.worker}")
            task.add_done_callback(lambda _: self._tasks.pop(key))

    async def _keep(self, member: Member) -> None:
        """Connects to one instance, again and again, while the roster has it."""
        backoff = Backoff()
        while self._wanted.get(member.worker) == member.epoch:
            try:
                await self._connect(member)
            except (LinkClosed, AvailabilityError) as reason:
                log.debug("peer is away", peer=member.worker, reason=str(reason))
            except ProtocolError as error:
                log.error("peer does not fit", peer=member.worker, error=str(error))
                await asyncio.sleep(REFUSED_SECONDS)
            await asyncio.sleep(backoff.next())

    async def _connect(self, member: Member) -> None:
        link = await dial(self._session, f"{member.url}/peer")
        try:
            ours = self._shell.hello()
            link.post(ours)
            theirs = await receive_hello(link, Role.DECODE)
            require_compatible(ours, theirs)
            await self._peers.relay(theirs, link)
        finally:
            await link.close()


async def serve(
    topology: Topology, name: str, host: str, port: int, engine: Sequence[str], env: Mapping[str, str]
) -> None:
    """Runs the worker until SIGTERM or SIGINT; `engine` are its engine process's arguments, `env` its environment.

    Raises `ConfigError` if it can't start and `WorkerLost` when its engine process dies.
    """
    shell = WorkerShell(name, Role.PREFILL, topology)
    peers = PeerTable(shell.post, shell.metrics.peers)
    shell.on_peer_message = peers.send
    async with shell.security.session() as session:
        dialer = PeerDialer(shell, session, peers)
        try:
            member = await shell.start(host, port, "prefill_worker.engine_process", engine, env)
            registration = Registration(session, topology.bootstrap_url, member, lambda: shell.load)
            roster = RosterWatcher(session, topology.bootstrap_url, name, dialer.on_change)
            relaying = [shell.run(), registration.run(), roster.run()]
            await run_until_stopped(*(asyncio.create_task(part) for part in relaying))
            await registration.leave("stopped")
        finally:
            await dialer.close()
            await peers.close()
            await shell.close()

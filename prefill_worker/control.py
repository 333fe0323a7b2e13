"""The control process of a prefill worker: dials every decode worker that bootstrap knows, and relays."""

from __future__ import annotations

import asyncio

import aiohttp

from bootstrap.client import Registration, RosterWatcher
from cluster.config import Topology
from cluster.errors import AvailabilityError, ProtocolError, StaleFence
from cluster.links import Backoff, LinkClosed, dial
from cluster.logging import get_logger
from cluster.messages import Member, Role
from cluster.peers import PeerTable, addressed, receive_hello, require_compatible
from cluster.server_process import run_until_stopped
from cluster.worker_shell import EngineCommand, WorkerShell

log = get_logger(__name__)

REFUSED_SECONDS = 10.0
"""Between two tries with a peer that does not fit us; only a new epoch of it can help."""


class PeerDialer:
    """Keeps a link to each decode worker of the roster; one task per instance while it is wanted or linked. While we
    have no engine process ourselves, the tasks wait for the next one."""

    def __init__(self, session: aiohttp.ClientSession, peers: PeerTable) -> None:
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
            except (LinkClosed, AvailabilityError, StaleFence) as reason:
                log.debug("peer is away", peer=member.worker, reason=str(reason))
            except ProtocolError as error:
                log.error("peer does not fit", peer=member.worker, error=str(error))
                await asyncio.sleep(REFUSED_SECONDS)
            await asyncio.sleep(backoff.next())

    async def _connect(self, member: Member) -> None:
        ours = await self._peers.hello()
        link = await dial(self._session, f"{member.url}/peer")
        try:
            link.post(addressed(ours, member.epoch))
            theirs = await receive_hello(link, Role.DECODE)
            require_compatible(ours, theirs)
            await self._peers.relay(ours, theirs, link)
        finally:
            await link.close()


async def serve(
    topology: Topology, name: str, host: str, port: int, command: EngineCommand, *, listen: str | None = None
) -> int:
    """Runs the worker until it is drained, by SIGTERM, SIGINT or over HTTP. Returns its exit status.

    The others reach it at `host`, where it also listens unless `listen` names another address of this machine.

    Raises `ConfigError` if it can't start and `WorkerLost` when its engine process dies again and again.
    """
    shell = WorkerShell(name, Role.PREFILL, topology, command)

    def join(member: Member) -> Registration:
        return Registration(session, topology.bootstrap_url, member, shell.load)

    async with shell.security.session() as session:
        dialer = PeerDialer(session, shell.peers)
        roster = RosterWatcher(session, topology.bootstrap_url, name, dialer.on_change)
        try:
            await shell.listen(host, port, listen)
            working = asyncio.ensure_future(shell.run(join))
            await run_until_stopped(working, asyncio.ensure_future(roster.run()), leave=shell.ask_drain)
        finally:
            await dialer.close()
            await shell.close()
    return shell.exit_code

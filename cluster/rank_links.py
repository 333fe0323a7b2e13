"""Connections from ranks on other hosts to rank 0, made by those who start the processes and inherited by these.

The control process opens a door for each life of its ranks; the rank hosts, which have been told its port and its token
over their own links, knock twice for each rank. Each connection begins with the token and with which of them it is;
what begins otherwise is closed. From then on it carries `cluster.ranks.Frames`: like the KV of requests, in the clear.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
import struct
from collections.abc import Sequence
from types import TracebackType

from cluster.errors import ConfigError, WorkerLost
from cluster.logging import get_logger
from cluster.ranks import watch_connection
from cluster.tasks import cancel

log = get_logger(__name__)

KNOCK_SECONDS = 5.0
"""For a connection to be made, and to say which it is."""
BACKLOG = 128
LINKS = 2
"""Of each rank, in order: for steps, for transfers."""

_HEAD = struct.Struct(">HB")
"""Rank, and which of its links."""
_TOKEN_BYTES = 32


def listen(host: str) -> socket.socket:
    """On any free port of that address. Raises `ConfigError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"can't listen on {host}: {error.strerror or error}") from error
    return listener


class RankDoor:
    """Where the links of one life come in. A context manager: with it end the listener, and our copies of the links."""

    def __init__(self, host: str) -> None:
        """Raises `ConfigError` if it can't listen at `host`."""
        self._listener = listen(host)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_hex(_TOKEN_BYTES)
        self._missing: set[tuple[int, int]] = set()
        self._found: dict[tuple[int, int], socket.socket] = {}
        self._complete = asyncio.Event()

    def __enter__(self) -> RankDoor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        for connection in self._found.values():
            connection.close()

    async def collect(self, ranks: Sequence[int]) -> list[int]:
        """Waits until all links of these are there. Returns the descriptors of rank 0's ends, in the order of
        `cluster.ranks.Rank.inherited`."""
        wanted = [(rank, link) for rank in ranks for link in range(LINKS)]
        self._missing.update(wanted)
        accepting = asyncio.ensure_future(self._accept())
        try:
            await self._complete.wait()
        finally:
            await cancel(accepting)
        return [self._found[key].fileno() for key in wanted]

    async def _accept(self) -> None:
        knocking: set[asyncio.Task[None]] = set()
        try:
            while True:
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
                connection.setblocking(False)
                task = asyncio.create_task(self._let_in(connection))
                knocking.add(task)
                task.add_done_callback(knocking.discard)
        finally:
            await cancel(*knocking)

    async def _let_in(self, connection: socket.socket) -> None:
        """Keeps it if it has the token and is one that is missing."""
        kept = False
        try:
            head = await asyncio.wait_for(_read(connection, len(self.token) + _HEAD.size), KNOCK_SECONDS)
            token, which = head[: len(self.token)], _HEAD.unpack(head[len(self.token) :])
            if hmac.compare_digest(token, self.token.encode()) and which in self._missing:
                watch_connection(connection)
                self._missing.discard(which)
                self._found[which] = connection
                kept = True
        except (OSError, asyncio.TimeoutError) as error:
            log.warning("a rank's link did not come to be", reason=str(error) or type(error).__name__)
        finally:
            if not kept:
                connection.close()
        if not self._missing:
            self._complete.set()


async def knock(host: str, port: int, token: str, rank: int) -> list[socket.socket]:
    """The links of a rank, from its own host. The caller closes them. Raises `WorkerLost`."""
    made: list[socket.socket] = []
    try:
        for link in range(LINKS):
            connection = await asyncio.wait_for(_connect(host, port), KNOCK_SECONDS)
            made.append(connection)
            await asyncio.get_running_loop().sock_sendall(connection, token.encode() + _HEAD.pack(rank, link))
    except (OSError, asyncio.TimeoutError) as error:
        for connection in made:
            connection.close()
        reason = str(error) or type(error).__name__
        raise WorkerLost(f"rank {rank} can't be linked to rank 0 at {host}:{port}: {reason}") from error
    return made


async def _connect(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
    connection = socket.socket(family, kind, protocol)
    try:
        connection.setblocking(False)
        await loop.sock_connect(connection, address)
        watch_connection(connection)
    except BaseException:
        connection.close()
        raise
    return connection


async def _read(connection: socket.socket, size: int) -> bytes:
    """Raises `ConnectionError` at an early end."""
    data = b""
    while len(data) < size:
        part = await asyncio.get_running_loop().sock_recv(connection, size - len(data))
        if not part:
            raise ConnectionResetError("it was closed before it had said which it is")
        data += part
    return data

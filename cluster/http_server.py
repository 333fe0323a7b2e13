"""The port of a process: one application, with or without TLS, and bounds on what strangers may hold of it.

Bounds that aiohttp does not have are kept here: connections beyond a number get one answer and are closed, before
anything is made for them.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from typing import NamedTuple

from aiohttp import web

from cluster.errors import ConfigError, Overloaded
from cluster.process import allow_open_files

BACKLOG = 1024
OTHER_FILES = 512
"""That a process has open beside its connections: logs, libraries, links, connections too many for a moment."""
REFUSAL_SECONDS = 1.0
"""How long a connection too many may take to say what it wants, so that it can be told no."""


class PortLimits(NamedTuple):
    """The defaults are for workers and bootstrap, whose connections are few and last long."""

    connections: int = 1024
    header_bytes: int = 16384
    """Of the request line, and of any one header."""
    idle_seconds: float = 75.0
    """A connection that has not sent a whole request head for so long is closed."""


class HttpServer:
    """`start`, then `stop` in any case. `stop` gives requests under way `shutdown_seconds`, then cancels them."""

    def __init__(
        self,
        app: web.Application,
        shutdown_seconds: float,
        tls: ssl.SSLContext | None = None,
        limits: PortLimits | None = None,
        *,
        handler_cancellation: bool = False,
    ) -> None:
        """`handler_cancellation`: a client's disconnect cancels its handler."""
        self._tls = tls
        self._limits = limits = limits or PortLimits()
        self._runner = web.AppRunner(
            app,
            access_log=None,
            shutdown_timeout=shutdown_seconds,
            handler_cancellation=handler_cancellation,
            keepalive_timeout=limits.idle_seconds,
            max_line_size=limits.header_bytes,
            max_field_size=limits.header_bytes,
        )
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int, advice: str) -> str:
        """Listens; returns the URL, with the port that was found for 0. Raises `ConfigError` with `advice` if it
        can't."""
        allow_open_files(self._limits.connections + OTHER_FILES)
        await self._runner.setup()
        server = self._runner.server
        assert server is not None, "setup makes it"

        def connect() -> asyncio.Protocol:
            return server() if self.connections < self._limits.connections else _TooMany()

        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(connect, host, port, ssl=self._tls, backlog=BACKLOG)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ConfigError(f"can't listen on {host}:{port}: {reason}; {advice}") from error
        bound = self._listener.sockets[0].getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        return f"{'http' if self._tls is None else 'https'}://{name}:{bound}"

    @property
    def connections(self) -> int:
        """Open, those too many left out."""
        server = self._runner.server
        return 0 if server is None else len(server.connections)

    async def stop(self) -> None:
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()


class _TooMany(asyncio.Protocol):
    """Answers whatever comes with 429. Waits for it, since to close on unread bytes would take the answer back."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._timer = asyncio.get_running_loop().call_later(REFUSAL_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        self._transport.write(_REFUSAL)
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()


_BODY = b'{"error":{"message":"too many connections","type":"rate_limit_error","param":null,"code":"Overloaded"}}'
_REFUSAL = b"\r\n".join(
    [
        f"HTTP/1.1 {Overloaded.status} Too Many Requests".encode(),
        b"Content-Type: application/json",
        f"Content-Length: {len(_BODY)}".encode(),
        b"Retry-After: 1",
        b"Connection: close",
        b"",
        _BODY,
    ]
)

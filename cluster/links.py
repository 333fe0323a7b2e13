"""The control channel: one WebSocket that carries `cluster.messages` both ways, on the port that serves HTTP too.

A `Link` belongs to one event loop. `post` never waits: a writer task sends in order, so that whoever has something to
say is not held up by a slow reader; a reader that stays too slow loses its link instead of our memory.
"""

from __future__ import annotations

import asyncio
from collections import deque

import aiohttp
from aiohttp import web

from cluster.messages import AnyMessage, Message, decode, encode

MAX_FRAME_BYTES = 64 * 1024 * 1024
MAX_OUTBOX = 65536
"""Messages that may wait for a slow reader."""
PING_SECONDS = 10.0
"""Idle links are pinged; one that does not answer within half of this is closed."""
DIAL_SECONDS = 5.0
CLOSE_SECONDS = 1.0
"""How long the other side may take to answer a close."""

Socket = aiohttp.ClientWebSocketResponse | web.WebSocketResponse


class LinkClosed(ConnectionError):
    """The link is over: the other side closed it, died, or was too slow."""


class Link:
    """Messages to and from one other process. Made by `dial` or `accept`, ended by `close`."""

    def __init__(self, socket: Socket, peer: str) -> None:
        self.peer = peer
        """The other side, for logs."""
        self._socket = socket
        self._outbox: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self._writer = asyncio.create_task(self._write(), name=f"link to {peer}")

    @property
    def closed(self) -> bool:
        return self._closed or self._socket.closed

    def post(self, message: Message) -> None:
        """Sends `message` after all posted before; on a closed link it is dropped (`receive` tells of the end)."""
        if self.closed:
            return
        if len(self._outbox) >= MAX_OUTBOX:
            self._closed = True
            self._outbox.clear()
        else:
            self._outbox.append(encode(message))
        self._wake.set()

    async def receive(self) -> AnyMessage:
        """The next message. Raises `LinkClosed` at the end and `UnknownMessage` for a frame that is no message."""
        return decode(await self.frame())

    async def frame(self) -> bytes:
        """The next frame as it came, for links that have messages of their own. Raises `LinkClosed` at the end."""
        frame = await self._socket.receive()
        if frame.type is aiohttp.WSMsgType.BINARY:
            binary: bytes = frame.data
            return binary
        if frame.type is aiohttp.WSMsgType.TEXT:
            text: str = frame.data
            return text.encode()
        raise LinkClosed(f"the link to {self.peer} is closed")

    async def close(self) -> None:
        """Sends what is posted, as far as the other side still reads, and ends the link."""
        self._closed = True
        self._wake.set()
        await asyncio.wait({self._writer}, timeout=2 * CLOSE_SECONDS)
        if not self._writer.done():
            self._writer.cancel()
            await asyncio.wait({self._writer})

    async def _write(self) -> None:
        while True:
            while self._outbox:
                frame = self._outbox.popleft()
                try:
                    await self._socket.send_bytes(frame)
                except (ConnectionError, RuntimeError):  # aiohttp: RuntimeError on a transport that is closing
                    self._closed = True
                    self._outbox.clear()
            if self._closed:
                await self._socket.close()
                return
            self._wake.clear()
            await self._wake.wait()


async def dial(session: aiohttp.ClientSession, url: str) -> Link:
    """Connects to the WebSocket at `url` (http://host:port/path). Raises `LinkClosed` with the reason."""
    try:
        socket = await asyncio.wait_for(
            session.ws_connect(
                url,
                max_msg_size=MAX_FRAME_BYTES,
                heartbeat=PING_SECONDS,
                compress=0,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),
            ),
            DIAL_SECONDS,
        )
    except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
        raise LinkClosed(f"can't connect to {url}: {error or type(error).__name__}") from error
    return Link(socket, url)


async def accept(request: web.Request) -> Link:
    """Turns an HTTP request into the server's end of a link. Raises what ends the request for one who has gone
    meanwhile."""
    socket = web.WebSocketResponse(
        max_msg_size=MAX_FRAME_BYTES, heartbeat=PING_SECONDS, compress=False, timeout=CLOSE_SECONDS
    )
    try:
        await socket.prepare(request)
    except ConnectionError as gone:  # no defect of ours, as which aiohttp would log it
        raise web.HTTPRequestTimeout(text="the connection is gone") from gone
    return Link(socket, request.remote or "unknown")


class Backoff:
    """Seconds to wait before the next try: doubles from `first` to `most`, starts over after a success."""

    def __init__(self, first: float = 0.05, most: float = 1.0) -> None:
        self._first = first
        self._most = most
        self._next = first

    def next(self) -> float:
        wait, self._next = self._next, min(self._next * 2, self._most)
        return wait

    def reset(self) -> None:
        self._next = self._first

"""Between the two processes of a worker: messages over a socket pair, each as a 4-byte length and its msgpack.

The engine's side (`EngineChannel`) never blocks the step loop: reads and writes take what the socket gives, the rest
waits in memory. The control process's side (`ControlChannel`) lives on its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator
from typing import Protocol, TypeVar

from cluster.engine_messages import EngineMessage, decode_engine_message
from cluster.messages import Message, encode

MessageT = TypeVar("MessageT")

_LENGTH = struct.Struct(">I")
_READ_BYTES = 1 << 20


class ControlGone(Exception):
    """The control process has closed its end: the engine process has nobody to work for."""


def frame(message: Message) -> bytes:
    body = encode(message)
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Cuts a byte stream into messages; keeps what is not complete yet."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[EngineMessage]:
        """Raises `UnknownMessage` for a frame that is no message."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            yield decode_engine_message(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]


class ReceiveOnly(Protocol):
    """`EngineChannel.receive_only`."""

    def __call__(self, kinds: tuple[type[MessageT], ...]) -> list[MessageT]: ...


class EngineChannel:
    """The engine process's end. All methods but `wake` belong to the step loop's thread."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._unframer = Unframer()
        self._kept: list[EngineMessage] = []
        self._outbox = bytearray()
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller = select.poll()
        self._poller.register(self._wake_reader, select.POLLIN)

    def wake(self) -> None:
        """Ends a `wait`, now or the next one. From any thread."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full: the waiter will wake anyway
            os.write(self._wake_writer, b"\0")

    def receive(self) -> list[EngineMessage]:
        """What has come since the last call. Raises `ControlGone` at the end of the stream."""
        messages, self._kept = self._kept + self._read(), []
        return messages

    def receive_only(self, kinds: tuple[type[MessageT], ...]) -> list[MessageT]:
        """Of what has come, the messages of these kinds; `receive` gives the others, later, in their order.

        Raises `ControlGone` at the end of the stream.
        """
        wanted: list[MessageT] = []
        messages, self._kept = self.receive(), []
        for message in messages:
            if isinstance(message, kinds):
                wanted.append(message)
            else:
                self._kept.append(message)
        return wanted

    def _read(self) -> list[EngineMessage]:
        messages: list[EngineMessage] = []
        while True:
            try:
                data = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                return messages
            except ConnectionError as error:
                raise ControlGone from error
            if not data:
                raise ControlGone
            messages.extend(self._unframer.feed(data))

    def send(self, message: Message) -> None:
        """Queues `message`; `flush` or `wait` sends it."""
        self._outbox += frame(message)

    def flush(self) -> None:
        """Sends as much as the socket takes now."""
        while self._outbox:
            try:
                sent = self._socket.send(self._outbox)
            except BlockingIOError:
                return
            except ConnectionError as error:
                raise ControlGone from error
            del self._outbox[:sent]

    def wait(self, seconds: float) -> None:
        """Blocks until there is something to receive, somebody calls `wake`, or the time is over."""
        self.flush()
        if self._kept:
            return
        self._poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._outbox else 0))
        for descriptor, _ in self._poller.poll(seconds * 1000):
            if descriptor == self._wake_reader:
                os.read(self._wake_reader, 4096)

    def drain(self) -> None:
        """Sends everything, however long that takes: for the last words."""
        self._socket.setblocking(True)
        self._socket.sendall(self._outbox)
        self._socket.setblocking(False)
        self._outbox.clear()


class ControlChannel:
    """The control process's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._unframer = Unframer()

    @classmethod
    async def open(cls, end: socket.socket) -> ControlChannel:
        return cls(*await asyncio.open_unix_connection(sock=end))

    def post(self, message: Message) -> None:
        """Sends in order; after the engine process's end, does nothing (`receive` tells of that)."""
        if not self._writer.is_closing():
            self._writer.write(frame(message))

    async def receive(self) -> list[EngineMessage]:
        """At least one message; an empty list is the end of the stream."""
        while True:
            try:
                data = await self._reader.read(_READ_BYTES)
            except ConnectionError:
                return []
            if not data:
                return []
            messages = list(self._unframer.feed(data))
            if messages:
                return messages

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):  # the other side went first
            await self._writer.wait_closed()

"""Both ends of a transfer as processes of their own, driven by a test through a pipe, call by call.

The parent's half is `Remote`: `remote.call("method", ...)` runs the method of the child's `BackendEnd`, `SenderEnd` or
`ReceiverEnd`, and raises here what it raised there. Ends are forked from a process that has imported this module, and
NIXL does without torch in them: both take seconds, and most of a minute in the emulated machine of `tests.rdma`.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import multiprocessing
import os
import sys
import threading
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import pytest

from cluster import messages, process_identity
from cluster.clock import MonotonicClock
from cluster.config import KV, TransferName
from cluster.errors import BatonError, ErrorInfo, from_info
from cluster.layout import KVLayout
from cluster.messages import Fence, PeerHello, PeerMessage, Role
from kv_transfer.backends import backend_environment, open_backend
from kv_transfer.backends.base import PoolMemory, WriteHandle, WriteState
from kv_transfer.digests import PageDigests
from kv_transfer.driver import WRITE_TIMEOUT_SECONDS
from kv_transfer.receiver import HandoffReceiver
from kv_transfer.sender import HandoffSender
from kv_transfer.thread import TransferThread
from tests.process.conditions import NETWORK, PACE

ANSWER_SECONDS = 30.0 * PACE


def _settings(transfer: str) -> KV:
    return KV(transfer=TransferName(transfer), network=NETWORK)


class SharedPool:
    """A page-aligned pool with a known pattern for each (page, seed)."""

    def __init__(self, pages: int, page_bytes: int) -> None:
        self._map = mmap.mmap(-1, pages * page_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.memory = PoolMemory(address, pages, page_bytes)
        self._digests = PageDigests(self.memory)

    def fill(self, page: int, seed: int) -> None:
        pattern = (b"%d/%d," % (page, seed)) * self.memory.page_bytes
        start = page * self.memory.page_bytes
        self._map[start : start + self.memory.page_bytes] = pattern[: self.memory.page_bytes]

    def digests(self, pages: list[int]) -> list[int]:
        return self._digests.of(pages)


class BackendEnd:
    """A transfer backend alone; `idle` is called while the parent says nothing."""

    def __init__(self, transfer: str, agent: str, pages: int, page_bytes: int) -> None:
        self.pool = SharedPool(pages, page_bytes)
        self.backend = open_backend(_settings(transfer), agent, self.pool.memory, "127.0.0.1")
        self._writes: list[WriteHandle] = []

    def idle(self) -> None:
        self.backend.progress()

    def fill(self, page: int, seed: int) -> None:
        self.pool.fill(page, seed)

    def digests(self, pages: list[int]) -> list[int]:
        return self.pool.digests(pages)

    def descriptor(self) -> bytes:
        return self.backend.descriptor

    def connect(self, peer: str, descriptor: bytes) -> None:
        self.backend.connect(peer, descriptor)

    def disconnect(self, peer: str) -> None:
        self.backend.disconnect(peer)

    def write(self, peer: str, sources: list[int], targets: list[int]) -> int:
        self._writes.append(self.backend.write(peer, sources, targets))
        return len(self._writes) - 1

    def wait(self, write: int, seconds: float) -> str:
        """The write's state after at most so long."""
        deadline = time.monotonic() + seconds
        while (state := self._writes[write].poll()) is WriteState.PENDING and time.monotonic() < deadline:
            time.sleep(1e-4)
        return state.value

    def poll(self, write: int) -> str:
        return self._writes[write].poll().value

    def restart(self) -> None:
        self.backend.restart()

    def close(self) -> None:
        self.backend.close()
        self.backend.close()


class _ShellEnd:
    """What sender and receiver processes have in common: pool, backend, thread, and messages for the other side."""

    role: Role

    def __init__(
        self,
        transfer: str,
        layout: dict[str, Any],
        pages: int,
        epoch: int,
        write_timeout: float = WRITE_TIMEOUT_SECONDS,
    ) -> None:
        self.layout = KVLayout(**layout)
        self.epoch = epoch
        self.pool = SharedPool(pages, self.layout.page_bytes)
        self.backend = open_backend(_settings(transfer), self.role.value, self.pool.memory, "127.0.0.1")
        self.clock = MonotonicClock()
        self.woken = threading.Event()
        self.oldest: float | None = None
        """When the oldest write began that is under way."""
        self.thread = TransferThread(
            self.backend,
            PageDigests(self.pool.memory),
            self.clock,
            self.woken.set,
            on_look=self._looked,
            write_timeout=write_timeout,
        )
        self.sent: list[bytes] = []

    def idle(self) -> None:
        """The thread does all there is to do."""

    def _looked(self, oldest: float | None) -> None:
        self.oldest = oldest

    def under_way(self) -> bool:
        """Whether a write of ours has begun and not ended."""
        return self.oldest is not None

    def send(self, worker: str, epoch: int, message: PeerMessage) -> None:
        self.sent.append(messages.encode(message))

    def hello(self) -> bytes:
        return messages.encode(
            PeerHello(
                worker=self.role.value,
                role=self.role,
                epoch=self.epoch,
                layout=self.layout,
                transfer=self.backend.name,
                descriptor=self.thread.descriptor,
                engine=process_identity.current(),
            )
        )

    def fill(self, page: int, seed: int) -> None:
        self.pool.fill(page, seed)

    def digests(self, pages: list[int]) -> list[int]:
        return self.pool.digests(pages)

    def idle_cpu(self, seconds: float) -> float:
        """CPU seconds that this process uses while nothing happens for so long."""
        before = time.process_time()
        threading.Event().wait(seconds)
        return time.process_time() - before

    def close(self) -> None:
        self.thread.close()


class SenderEnd(_ShellEnd):
    role = Role.PREFILL

    def __init__(self, transfer: str, layout: dict[str, Any], pages: int, epoch: int, write_timeout: float) -> None:
        super().__init__(transfer, layout, pages, epoch, write_timeout)
        self.sender = HandoffSender(self.thread, self.layout, self.send, self.clock, True, epoch=epoch)

    def peer_up(self, hello: bytes) -> None:
        self.sender.peer_up(messages.decode(hello))

    def peer_down(self, worker: str, epoch: int) -> None:
        self.sender.peer_down(worker, epoch)

    def offer(self, fence: Fence, tokens: int) -> None:
        self.sender.offer(fence, "decode", tokens)

    def computed(self, fence: Fence, pages: list[int], tokens: int) -> None:
        self.sender.computed(fence, pages, tokens)

    def finish(self, fence: Fence, token: int) -> None:
        self.sender.finish(fence, token)

    def step(self, epoch: int, received: list[bytes]) -> tuple[list[bytes], list[Any]]:
        """Takes what the other side has sent; returns our own messages and what has ended."""
        for frame in received:
            self.sender.receive("decode", epoch, messages.decode(frame))
        ended = self.sender.poll(self.clock.now())
        sent, self.sent = self.sent, []
        return sent, ended


class ReceiverEnd(_ShellEnd):
    role = Role.DECODE

    def __init__(self, transfer: str, layout: dict[str, Any], pages: int, epoch: int) -> None:
        super().__init__(transfer, layout, pages, epoch)
        self.receiver = HandoffReceiver(self.thread, self.layout, self.send, self.clock, True, epoch=epoch)

    def peer_up(self, hello: bytes) -> None:
        self.receiver.peer_up(messages.decode(hello))

    def peer_down(self, worker: str, epoch: int) -> None:
        self.receiver.peer_down(worker, epoch)

    def grant(self, fence: Fence, pages: list[int], skip: int) -> None:
        self.receiver.grant(fence, pages, skip)

    def cancel(self, fence: Fence) -> None:
        self.receiver.cancel(fence, ErrorInfo("Cancelled", "the client has left"))

    def quarantined(self) -> int:
        return len(self.receiver.quarantined)

    def step(self, epoch: int, received: list[bytes]) -> tuple[list[bytes], list[Any]]:
        for frame in received:
            self.receiver.receive("prefill", epoch, messages.decode(frame))
        events = self.receiver.poll(self.clock.now())
        sent, self.sent = self.sent, []
        return sent, events


ENDS = {kind.__name__: kind for kind in (BackendEnd, SenderEnd, ReceiverEnd)}


class Remote:
    """The parent's half. Made by `start`; `kill` or `close` in any case."""

    def __init__(self, process: ForkServerProcess, connection: Connection) -> None:
        self.process = process
        self._connection = connection

    @classmethod
    def start(cls, kind: type, transfer: str, *arguments: Any, environment: dict[str, str] | None = None) -> Remote:
        remote = cls.begin(kind, transfer, *arguments, environment=environment)
        remote.answer()
        return remote

    @classmethod
    def begin(cls, kind: type, transfer: str, *arguments: Any, environment: dict[str, str] | None = None) -> Remote:
        """Its first `answer`, None, comes when it is ready."""
        context = _forks()
        ours, theirs = context.Pipe()
        with theirs:
            settings = {**backend_environment(TransferName(transfer)), **(environment or {})}
            process = context.Process(target=serve, args=(theirs, settings))
            process.start()
        remote = cls(process, ours)
        remote.post(kind.__name__, transfer, *arguments)
        return remote

    def call(self, method: str, *arguments: Any) -> Any:
        """Raises what the method raised there, or `AssertionError` if the child is dead or silent."""
        self.post(method, *arguments)
        return self.answer()

    def post(self, method: str, *arguments: Any) -> None:
        self._connection.send((method, arguments))

    def answer(self) -> Any:
        assert self._connection.poll(ANSWER_SECONDS), "the child is silent"
        result = self._connection.recv()
        if isinstance(result, ErrorInfo):
            raise ValueError(result.message) if result.code == "ValueError" else from_info(result)
        return result

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self._connection.close()

    def close(self) -> None:
        """Ends it well, and checks that it went well."""
        if self.process.is_alive() and not self._connection.closed:
            self.call("close")
            self._connection.close()
            self.process.join(10)
            assert self.process.exitcode == 0, "a clean end"


@functools.cache
def _forks() -> ForkServerContext:
    """Starts the process from which the ends are forked. What they need on LD_LIBRARY_PATH they inherit from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in backend_environment(TransferName.MOONCAKE).items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def serve(connection: Connection, environment: dict[str, str]) -> None:
    """The child's loop, until the parent hangs up. `environment` is there before an engine is loaded."""
    os.environ.update(environment)
    sys.modules["torch"] = None  # type: ignore[assignment]  # it can't be imported; NIXL would, to see its version
    kind, arguments = connection.recv()
    end = ENDS[kind](*arguments)
    connection.send(None)
    while True:
        if not connection.poll(1e-3):
            end.idle()
            continue
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            result = getattr(end, method)(*arguments)
        except BatonError as error:
            result = error.to_info()
        except ValueError as error:
            result = ErrorInfo("ValueError", str(error))
        connection.send(result)
        if method == "close":
            return

"""A prefill and a decode worker in one process: real sender and receiver, a manual clock, an in-memory engine.

Nothing happens by itself: tests move messages, let the transfer engines work, and turn the clock.
"""

from __future__ import annotations

import ctypes
from collections import deque

from cluster.clock import ManualClock
from cluster.layout import KVLayout
from cluster.messages import (
    DeathAsked,
    DeathWitnessed,
    Fence,
    PeerHello,
    PeerMessage,
    ProcessIdentity,
    Role,
)
from kv_transfer.backends.base import PoolMemory
from kv_transfer.backends.memory import MemoryBackend, MemoryFabric
from kv_transfer.digests import PageDigests
from kv_transfer.driver import Command, Result, TransferDriver
from kv_transfer.receiver import HandoffReceiver, ReceiverEvent
from kv_transfer.sender import HandoffEnded, HandoffSender

LAYOUT = KVLayout(model="test", dtype="float16", page_size=4, layers=1, kv_heads=1, head_dim=2)
PREFILL_EPOCH, DECODE_EPOCH = 100, 200


def fence(request: str = "r", attempt: int = 0, prefill: int = PREFILL_EPOCH, decode: int = DECODE_EPOCH) -> Fence:
    return Fence(request, attempt, prefill, decode)


class Pool:
    """Pages in ordinary memory."""

    def __init__(self, pages: int, page_bytes: int = LAYOUT.page_bytes) -> None:
        self._buffer = ctypes.create_string_buffer(pages * page_bytes)
        self.memory = PoolMemory(ctypes.addressof(self._buffer), pages, page_bytes)

    def fill(self, page: int, byte: int) -> None:
        ctypes.memset(self.memory.page_address(page), byte, self.memory.page_bytes)

    def read(self, page: int) -> bytes:
        return ctypes.string_at(self.memory.page_address(page), self.memory.page_bytes)


class InlinePort:
    """A `TransferPort` that works only when told to; `works_while_awaited`: also when somebody waits for it."""

    def __init__(self, driver: TransferDriver) -> None:
        self.driver = driver
        self.works_while_awaited = False
        self.commands: deque[Command] = deque()
        self._results: list[Result] = []

    def post(self, command: Command) -> None:
        self.commands.append(command)

    def results(self) -> list[Result]:
        found, self._results = self._results, []
        return found

    def wait(self, seconds: float) -> bool:
        if self.works_while_awaited:
            self.run()
        return bool(self._results)

    def run(self, turns: int = 1) -> None:
        """Carries out all commands, then drives what is under way."""
        while self.commands:
            self._results += self.driver.take(self.commands.popleft())
        for _ in range(turns):
            self._results += self.driver.turn()


class FollowerPort:
    """A `RankPort` in the same process: its results come by rank 0's port."""

    def __init__(self, own: InlinePort, first: InlinePort) -> None:
        self._own = own
        self._first = first

    def post(self, command: Command) -> None:
        self._own.post(command)

    def run(self, turns: int = 1) -> None:
        self._own.run(turns)
        self._first._results += self._own.results()


class World:
    """`to_decode` and `to_prefill` are the wires; `deliver` moves one message."""

    def __init__(self, pages: int = 16, digests: bool = True) -> None:
        self.clock = ManualClock(1000.0)
        self.fabric = MemoryFabric()
        self.dead: set[int] = set()
        """Processes whose death the decode worker's own kernel proves."""
        self.dead_elsewhere: set[int] = set()
        """Those whose death prefill's kernel proves."""
        self.digests = digests
        self.pages = pages
        self.source = Pool(pages)
        self.targets: list[Pool] = []
        """Of all lives: no two may have the same addresses."""
        self.to_decode: deque[PeerMessage] = deque()
        self.to_prefill: deque[PeerMessage] = deque()
        self.prefill_epoch = PREFILL_EPOCH
        self.decode_epoch = DECODE_EPOCH
        self.start_decode()
        self.start_prefill()

    def start_decode(self) -> None:
        """A decode process, with a pool of its own; a second call is its successor, the one before is dead."""
        self.fabric.alive.pop(f"decode-{self.decode_epoch - 1}", None)
        self.target = Pool(self.pages)
        self.targets.append(self.target)
        self.decode_port = self._port(f"decode-{self.decode_epoch}", self.target)
        self.receiver = HandoffReceiver(
            self.decode_port,
            LAYOUT,
            lambda worker, epoch, message: self.to_prefill.append(message),
            self.clock,
            self.digests,
            epoch=self.decode_epoch,
            is_dead=lambda process: process.pid in self.dead,
        )

    def start_prefill(self) -> None:
        """A prefill process; a second call is its successor."""
        self.prefill_port = self._port(f"prefill-{self.prefill_epoch}", self.source)
        self.sender = HandoffSender(
            self.prefill_port,
            LAYOUT,
            lambda worker, epoch, message: self.to_decode.append(message),
            self.clock,
            self.digests,
            epoch=self.prefill_epoch,
        )

    def _port(self, agent: str, pool: Pool) -> InlinePort:
        backend = MemoryBackend(self.fabric, agent, pool.memory)
        self.descriptor = backend.descriptor if pool is self.target else self.descriptor
        return InlinePort(TransferDriver(backend, PageDigests(pool.memory), self.clock))

    # --- the connection ----------------------------------------------------------------------------------------------

    def hello(self, role: Role, epoch: int) -> PeerHello:
        return PeerHello(
            worker=role.value,
            role=role,
            epoch=epoch,
            layout=LAYOUT,
            transfer="memory",
            descriptor=self.descriptor,
            engine=ProcessIdentity("boot", "pid", epoch, 1),
        )

    def connect(self) -> None:
        self.to_decode.clear()
        self.to_prefill.clear()
        self.sender.peer_up(self.hello(Role.DECODE, self.decode_epoch))
        self.receiver.peer_up(self.hello(Role.PREFILL, self.prefill_epoch))

    def disconnect(self) -> None:
        """What is on the wire is lost."""
        self.to_decode.clear()
        self.to_prefill.clear()
        self.sender.peer_down("decode", self.decode_epoch)
        self.receiver.peer_down("prefill", self.prefill_epoch)

    def deliver_to_decode(self) -> PeerMessage:
        message = self.to_decode.popleft()
        self.receiver.receive("prefill", self.prefill_epoch, message)
        return message

    def deliver_to_prefill(self) -> PeerMessage:
        message = self.to_prefill.popleft()
        if not isinstance(message, DeathAsked):
            self.sender.receive("decode", self.decode_epoch, message)
        elif message.process.pid in self.dead_elsewhere:
            self.to_decode.append(DeathWitnessed(message.process))
        return message

    def deliver(self) -> list[PeerMessage]:
        """Both ways, until nothing is on the wires."""
        moved: list[PeerMessage] = []
        while self.to_decode or self.to_prefill:
            if self.to_decode:
                moved.append(self.deliver_to_decode())
            if self.to_prefill:
                moved.append(self.deliver_to_prefill())
        return moved

    # --- both workers ------------------------------------------------------------------------------------------------

    def poll_sender(self) -> list[HandoffEnded]:
        self.prefill_port.run()
        return self.sender.poll(self.clock.now())

    def poll_receiver(self) -> list[ReceiverEvent]:
        self.decode_port.run()
        return self.receiver.poll(self.clock.now())

    def settle(self) -> list[ReceiverEvent]:
        """Long enough for pages to be drained."""
        self.decode_port.run()
        self.clock.advance(1.0)
        self.decode_port.run(turns=60)
        return self.receiver.poll(self.clock.now())

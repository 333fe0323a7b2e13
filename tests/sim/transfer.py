"""The transfer engine of the simulation: real drivers over an in-memory fabric, on which writes take time and fail.

A write under way can be slow, can fail, arrive damaged, or hang; it waits while its process is stopped or the network
is cut. Bytes of a write that failed, or whose process died, may still be in the receiver's kernel: they land while the
receiver drives its engine, after everybody was told of the end. Whatever lands is checked: at that moment the pages
must belong, in both ledgers, to that very handoff.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from cluster.clock import Clock
from cluster.errors import BatonError, PeerUnreachable, TransferStuck
from cluster.messages import Fence
from engine.pages import Owner, OwnerKind
from kv_transfer.backends.base import PoolMemory, WriteState
from kv_transfer.backends.memory import MemoryBackend, MemoryFabric
from kv_transfer.driver import Command, Digester, PostWrites, Result, TransferDriver
from tests.sim.kernel import SimLoop, Strand, Violation
from tests.sim.model import SimEngine

TURN_SECONDS = 0.002
"""Between two rounds of a transfer thread that is busy."""
ROUNDS_AT_ONCE = 5
COMMAND_SECONDS = 0.0005
IDLE_SECONDS = 0.5
UNREACHABLE_SECONDS = 5.5
"""A write into a network that is cut fails after so long (UCX_TCP_USER_TIMEOUT)."""


@dataclass
class SimWrite:
    """One batch of pages on the fabric."""

    source: SimBackend
    target: SimBackend | None
    fence: Fence | None
    sources: Sequence[int]
    targets: Sequence[int]
    posted_at: float
    damaged: bool = False
    state: WriteState = WriteState.PENDING
    bytes: list[bytes] = field(default_factory=list)
    """What the receiver's kernel has of it, once the sender is out of the game."""
    rounds: int = 0
    """Until these bytes land, in rounds of the receiver's engine."""

    def poll(self) -> WriteState:
        return self.state


class SimFabric(MemoryFabric):
    """All pools. `reachable(a, b)` tells whether the network between two hosts is whole."""

    def __init__(self, loop: SimLoop, random: Random, reachable: Callable[[str, str], bool]) -> None:
        super().__init__()
        self._loop = loop
        self._random = random
        self._reachable = reachable
        self.under_way: list[SimWrite] = []
        self.plans: dict[Fence, str] = {}
        """What shall happen to a handoff's next write: "fail", "damage", "slow" or "hang"."""

    def post(self, write: SimWrite) -> None:
        plan = self.plans.pop(write.fence, None) if write.fence is not None else None
        self.under_way.append(write)
        if plan == "hang":
            return
        seconds = self._random.uniform(0.003, 0.05)
        if plan == "slow":
            seconds = self._random.uniform(1.0, 4.0)
        write.damaged = plan == "damage"
        self._loop.at(seconds, None, self._arrive, write, plan == "fail")

    def _arrive(self, write: SimWrite, failing: bool) -> None:
        """The write's time has come; it waits on while its engine is stopped or the network is cut."""
        if write.state is not WriteState.PENDING:
            return
        source, target = write.source, write.target
        if target is None or not target.strand.alive:
            self._end(write, WriteState.FAILED)
        elif source.strand.holds:
            self._loop.at(0.05, None, self._arrive, write, failing)
        elif not self._reachable(source.host, target.host):
            if self._loop.now() - write.posted_at > UNREACHABLE_SECONDS:
                self._fail(write)
            else:
                self._loop.at(0.1, None, self._arrive, write, failing)
        elif failing:
            self._fail(write)
        else:
            self._land(write, source.contents(write.sources))
            self._end(write, WriteState.DONE)

    def _fail(self, write: SimWrite) -> None:
        self._keep_bytes(write)
        self._end(write, WriteState.FAILED)

    def _end(self, write: SimWrite, state: WriteState) -> None:
        write.state = state
        self.under_way.remove(write)
        write.source.thread.turn_soon()

    def left(self, backend: SimBackend) -> None:
        """That process is dead."""
        self.alive.pop(backend.agent, None)
        self.end_writes_of(backend)

    def end_writes_of(self, source: SimBackend) -> None:
        """What its writes have put into the receivers' kernels already is all that can still land."""
        for write in [write for write in self.under_way if write.source is source]:
            self._keep_bytes(write)
            write.state = WriteState.FAILED
            self.under_way.remove(write)

    def _keep_bytes(self, write: SimWrite) -> None:
        target = write.target
        if target is None or not target.strand.alive or self._random.random() < 0.4:
            return
        write.bytes = write.source.contents(write.sources)
        write.rounds = self._random.randint(1, 40)
        target.late.append(write)
        target.thread.turn_soon()

    def _land(self, write: SimWrite, contents: list[bytes]) -> None:
        target = write.target
        assert target is not None
        write.source.require_source(write)
        target.require_target(write)
        for page, data in zip(write.targets, contents, strict=True):
            ctypes.memmove(target.pool.page_address(page), data, len(data))
        if write.damaged and write.targets:
            first = ctypes.c_uint8.from_address(target.pool.page_address(write.targets[0]))
            first.value ^= 0xFF

    def land_late_bytes(self, target: SimBackend) -> None:
        """One round of the receiver's engine."""
        for write in target.late:
            write.rounds -= 1
            if write.rounds <= 0:
                self._land(write, write.bytes)
        target.late = [write for write in target.late if write.rounds > 0]


class SimBackend(MemoryBackend):
    """One engine process's end. `strand` is its transfer thread. `stubborn`: like Mooncake, it can't end its writes."""

    def __init__(
        self, fabric: SimFabric, host: str, epoch: int, pool: PoolMemory, engine: SimEngine, strand: Strand
    ) -> None:
        super().__init__(fabric, f"{host}@{epoch}", pool)
        self.agent = f"{host}@{epoch}"
        self.host = host
        self.strand = strand
        self.stubborn = epoch % 2 == 0
        self.thread: SimTransferThread
        self.posting: Fence | None = None
        """Of the command that is carried out; None: a trial of a new connection."""
        self.late: list[SimWrite] = []
        self._sim = fabric
        self._engine = engine

    def write(self, peer: str, sources: Sequence[int], targets: Sequence[int]) -> SimWrite:
        if peer not in self._peers:
            raise PeerUnreachable(f"{peer} is not connected")
        remote, _ = self._peers[peer]
        remote.page_addresses(targets)
        target = self.fabric.alive.get(remote.endpoint.decode())
        assert target is None or isinstance(target, SimBackend)
        now = self._sim._loop.now()
        write = SimWrite(self, target, self.posting, tuple(sources), tuple(targets), now)
        self._sim.post(write)
        return write

    def restart(self) -> None:
        if self.stubborn:
            raise TransferStuck("its engine can't be ended")
        self._sim.end_writes_of(self)
        self._peers.clear()

    def progress(self) -> None:
        if self.late:
            self._sim.land_late_bytes(self)

    def contents(self, pages: Sequence[int]) -> list[bytes]:
        return [ctypes.string_at(self.pool.page_address(page), self.pool.page_bytes) for page in pages]

    def require_source(self, write: SimWrite) -> None:
        """A live writer reads pages that are still that sequence's."""
        if write.fence is None or write.bytes or not self.strand.alive:
            return
        fence, ledger = write.fence, self._engine.ledger
        own = {*ledger.pages_of(Owner(OwnerKind.SEQUENCE, fence)), *self._engine.prefixes.pages_of(fence)}
        if not own.issuperset(write.sources):
            raise Violation(f"a write of {fence} reads pages {write.sources}, of which it has only {sorted(own)}")

    def require_target(self, write: SimWrite) -> None:
        """The one writer of a granted page is the one it was granted to."""
        fence, ledger = write.fence, self._engine.ledger
        if fence is None:
            if list(write.targets) != [self.pool.trial_page]:
                raise Violation(f"a trial write lands in pages {list(write.targets)}")
            return
        granted = {
            *ledger.pages_of(Owner(OwnerKind.LEASE, fence)),
            *ledger.pages_of(Owner(OwnerKind.QUARANTINE, fence)),
        }
        if not granted.issuperset(write.targets):
            raise Violation(
                f"a write of {fence} lands in pages {list(write.targets)} of {self.agent}, where only "
                f"{sorted(granted)} are granted to it: a page has two writers"
            )


class SimTransferThread:
    """In place of `kv_transfer.thread.TransferThread`: the real driver, run by the simulation."""

    def __init__(
        self,
        loop: SimLoop,
        step_strand: Strand,
        backend: SimBackend,
        digester: Digester | None,
        clock: Clock,
        wake: Callable[[], None],
        trial_page: int | None,
        on_look: Callable[[float | None], None],
        write_timeout: float,
    ) -> None:
        self.descriptor = backend.descriptor
        self._loop = loop
        self._driver = TransferDriver(backend, digester, clock, trial_page, write_timeout)
        self._backend = backend
        self._step_strand = step_strand
        self._wake = wake
        self._on_look = on_look
        self._commands: deque[Command] = deque()
        self._results: list[Result] = []
        self._death: BatonError | None = None
        self._due = False
        backend.thread = self
        loop.at(IDLE_SECONDS, backend.strand, self._look_up)

    def post(self, command: Command) -> None:
        self._commands.append(command)
        self.turn_soon(COMMAND_SECONDS)

    def deliver(self, results: Sequence[Result]) -> None:
        raise AssertionError("no worker here has more ranks than one")

    def results(self) -> list[Result]:
        found, self._results = self._results, []
        if self._death is not None and not found:
            raise self._death
        return found

    def wait(self, seconds: float) -> bool:
        self._loop.spend(self._step_strand, seconds, lambda: bool(self._results))
        return bool(self._results)

    def turn_soon(self, seconds: float = 0.0) -> None:
        if not self._due:
            self._due = True
            self._loop.at(seconds, self._backend.strand, self._turn)

    def _look_up(self) -> None:
        """Twice a second in any case, as the real thread does."""
        if self._death is None:
            self.turn_soon()
            self._loop.at(IDLE_SECONDS, self._backend.strand, self._look_up)

    def _turn(self) -> None:
        self._due = False
        found: list[Result] = []
        try:
            self._work(found)
        except TransferStuck as error:
            self._death = error
        self._on_look(self._driver.oldest)
        if found or self._death is not None:
            self._results += found
            self._wake()

    def _work(self, found: list[Result]) -> None:
        driver = self._driver
        while self._commands:
            command = self._commands.popleft()
            self._backend.posting = command.fence if isinstance(command, PostWrites) else None
            found += driver.take(command)
        for _ in range(ROUNDS_AT_ONCE):
            found += driver.turn() if driver.busy else []
        if not driver.busy:
            driver.idle()
        if self._backend.late or driver._settling:
            self.turn_soon(TURN_SECONDS * ROUNDS_AT_ONCE)

    def close(self) -> None:
        self._driver.close()

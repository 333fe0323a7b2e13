"""Everything the transfer thread does, without the thread: commands in, results out, one backend in between.

    Connect, Disconnect     a peer instance that we may write to (sender)
    PostWrites              -> WritesEnded, with the digests of the pages that were sent (sender)
    ExpectWrites            a peer may write to us: the backend needs `progress` (receiver)
    ComputeDigests          -> DigestsComputed; the writes have ended well (receiver)
    Settle                  -> Settled; the writes have ended badly (receiver)

A peer here is one instance of a worker, `worker@epoch`: a successor is another peer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Union

import msgspec

from cluster.clock import Clock
from cluster.config import KV
from cluster.errors import AvailabilityError, BatonError, PeerUnreachable, ProtocolError, TransferFailed, TransferStuck
from cluster.logging import get_logger
from cluster.messages import Fence
from kv_transfer.backends.base import PoolDescriptor, TransferBackend, WriteHandle, WriteState
from kv_transfer.plan import Batch
from kv_transfer.shard_plan import PageSlice, Runs

log = get_logger(__name__)

SETTLE_SECONDS = 0.05
SETTLE_TURNS = 50
"""A failed writer's last bytes may already be in our kernel's socket buffers, from where our own end of the transfer
engine still delivers them: with TCP, a receiver that is stopped, given up by its writer and resumed gets late bytes
(observed with NIXL and Mooncake; at most one socket buffer, 6 MB). So the engine is driven for so long, and so often,
after the writer's word or death, before a page is called free. It comes on top of that proof, never instead."""

WRITE_TIMEOUT_SECONDS = KV().write_timeout_seconds
LONGEST_LOOK_AWAY = 1.0
"""Seconds between two turns that count as waiting for a write."""


class Connect(msgspec.Struct, frozen=True, tag=True):
    """To its pool, of each page all, or the part that it gets from this rank."""

    peer: str
    descriptor: bytes
    part: PageSlice | None = None


class Disconnect(msgspec.Struct, frozen=True, tag=True):
    """Takes effect when the peer's writes have ended."""

    peer: str


class PostWrites(msgspec.Struct, frozen=True, tag=True):
    fence: Fence
    peer: str
    batch: Batch


class ExpectWrites(msgspec.Struct, frozen=True, tag=True):
    """Lasts until `ComputeDigests` or `Settle` for the same fence."""

    fence: Fence


class ComputeDigests(msgspec.Struct, frozen=True, tag=True):
    """Ends the expectation; `pages` may be empty."""

    fence: Fence
    pages: tuple[int, ...]
    parts: tuple[Runs, ...] | None = None
    """What has a digest of its own in each page; None: the page as a whole."""
    rank: int = 0
    """Who computes, for the answer."""


class Settle(msgspec.Struct, frozen=True, tag=True):
    """Ends the expectation; see `SETTLE_SECONDS`."""

    fence: Fence


class WritesEnded(msgspec.Struct, frozen=True, tag=True):
    """A batch is terminal: our pages are not read any more. Times are of the driver's clock."""

    fence: Fence
    peer: str
    batch: Batch
    error: BatonError | None
    digests: tuple[int, ...]
    started: float
    ended: float


class DigestsComputed(msgspec.Struct, frozen=True, tag=True):
    fence: Fence
    digests: tuple[int, ...]
    """Page by page, and of each its parts."""
    rank: int = 0


class Settled(msgspec.Struct, frozen=True, tag=True):
    fence: Fence


Command = Union[Connect, Disconnect, PostWrites, ExpectWrites, ComputeDigests, Settle]
Result = Union[WritesEnded, DigestsComputed, Settled]


class TransferPort(Protocol):
    """What sender and receiver need of the transfer thread."""

    def post(self, command: Command) -> None:
        """Never blocks."""

    def results(self) -> list[Result]:
        """What has ended since the last call. Raises whatever ended the thread."""

    def wait(self, seconds: float) -> bool:
        """Blocks until `results` has something to give, at most for so long; whether it has."""


class Digester(Protocol):
    on_host: bool
    """Whether the host reads the pages. Where the device does, digests are others."""

    def of(self, pages: Sequence[int], runs: Runs | None = None) -> list[int]:
        """One digest per page, of these bytes of it; None: of all."""


@dataclass
class _Peer:
    """`connected`: the backend knows it; `broken`: a write failed, the connection has to be made anew. `waited`: for so
    many seconds we have watched its writes, and none of them ended."""

    descriptor: bytes
    part: PageSlice | None = None
    connected: bool = False
    broken: bool = False
    leaving: bool = False
    in_flight: int = 0
    waited: float = 0.0

    def begin_write(self) -> None:
        self.in_flight += 1

    def end_write(self) -> None:
        self.in_flight -= 1
        self.waited = 0.0


@dataclass
class _Write:
    command: PostWrites
    handle: WriteHandle
    digests: tuple[int, ...]
    started: float
    ended: float | None
    """None if it was under way when its digests were computed."""


@dataclass
class _Settling:
    until: float
    turns: int = field(default=SETTLE_TURNS)


class TransferDriver:
    """Owns the backend. All methods on one thread. Only typed errors become results; any other propagates.

    With a `trial_page` of ours, a new connection is tried at once by writing it to the peer's (`PoolMemory`):
    engines finish a connection with its first write, which took 30 to 300 ms here, and no request should wait for that.

    A peer to which no write ends for `write_timeout` seconds costs all of them: the backend is restarted, since only an
    engine that is gone is known to write no more. Raises `TransferStuck` where even that is no help.
    """

    def __init__(
        self,
        backend: TransferBackend,
        digester: Digester | None,
        clock: Clock,
        trial_page: int | None = None,
        write_timeout: float = WRITE_TIMEOUT_SECONDS,
    ) -> None:
        self._backend = backend
        self._digester = digester
        self._clock = clock
        self._trial_page = trial_page
        self._write_timeout = write_timeout
        self._looked_at = clock.now()
        self._trials: deque[tuple[str, WriteHandle]] = deque()
        self._peers: dict[str, _Peer] = {}
        self._writes: deque[_Write] = deque()
        self._expected: dict[Fence, float] = {}
        """Since when."""
        self._settling: dict[Fence, _Settling] = {}

    @property
    def busy(self) -> bool:
        """Whether `turn` has anything to drive."""
        return bool(self._writes or self._trials or self._expected or self._settling)

    @property
    def oldest(self) -> float | None:
        """When the oldest of what is under way began: a write of ours, or a peer's that we expect."""
        begun = [next(iter(self._expected.values()))] if self._expected else []
        if self._writes:
            begun.append(self._writes[0].started)
        return min(begun, default=None)

    def take(self, command: Command) -> list[Result]:
        """Carries out one command, as far as it goes without waiting."""
        if isinstance(command, PostWrites):
            return self._post(command)
        if isinstance(command, ComputeDigests):
            self._expected.pop(command.fence, None)
            return [DigestsComputed(command.fence, self._digests_of_parts(command), command.rank)]
        if isinstance(command, Connect):
            self._connect(command)
        elif isinstance(command, Disconnect):
            self._disconnect(command.peer)
        elif isinstance(command, ExpectWrites):
            self._expected.setdefault(command.fence, self._clock.now())
        else:
            self._expected.pop(command.fence, None)
            self._settling[command.fence] = _Settling(self._clock.now() + SETTLE_SECONDS)
        return []

    def turn(self) -> list[Result]:
        """Drives all that is under way, once."""
        if self._expected or self._settling:
            self._backend.progress()
        self._poll_trials()
        results = self._poll_writes()
        stuck = self._find_stuck()
        if stuck is not None:
            results += self._end_all_writes(stuck)
        return results + self._settle()

    def idle(self) -> None:
        """Lets the backend look after its connections while nothing is under way; a few times a second."""
        self._backend.progress()

    def close(self) -> None:
        self._backend.close()

    # --- writes --------------------------------------------------------------------------------------------------

    def _post(self, command: PostWrites) -> list[Result]:
        started = self._clock.now()
        batch = command.batch
        try:
            peer = self._reachable(command.peer)
            handle = self._backend.write(command.peer, batch.sources, batch.targets)
        except (AvailabilityError, ProtocolError) as error:
            return [WritesEnded(command.fence, command.peer, batch, error, (), started, self._clock.now())]
        peer.begin_write()
        # An engine that moves the bytes inside of the call is done by now; one with a NIC moves them meanwhile.
        ended = None if handle.poll() is WriteState.PENDING else self._clock.now()
        self._writes.append(_Write(command, handle, self._digests(batch.sources, peer.part), started, ended))
        return []

    def _poll_writes(self, culprit: str | None = None) -> list[Result]:
        """`culprit`: the peer for whose sake the engine was restarted. Its writes fail by its fault, others by ours."""
        results: list[Result] = []
        for _ in range(len(self._writes)):
            write = self._writes.popleft()
            state = write.handle.poll()
            if state is WriteState.PENDING:
                self._writes.append(write)
                continue
            command = write.command
            failed = state is WriteState.FAILED
            self._ended(command.peer, failed=failed)
            error: BatonError | None = None
            if failed and culprit not in (None, command.peer):
                error = TransferFailed(f"the transfer engine was ended because of a write to {culprit}")
            elif failed:
                error = PeerUnreachable(f"the write to {command.peer} failed")
            ended = self._clock.now() if write.ended is None else write.ended
            results.append(
                WritesEnded(command.fence, command.peer, command.batch, error, write.digests, write.started, ended)
            )
        return results

    def _ended(self, name: str, *, failed: bool) -> None:
        """One write less; a connection that failed, or is not wanted any more, goes with its last one."""
        peer = self._peers[name]
        peer.end_write()
        peer.broken |= failed
        if peer.in_flight == 0 and (peer.broken or peer.leaving):
            self._backend.disconnect(name)
            peer.connected = peer.broken = False
            if peer.leaving:
                del self._peers[name]

    def _find_stuck(self) -> str | None:
        """A peer to which nothing has ended for too long. Time in which we have not looked does not count: this process
        may have been stopped itself, or this thread held up by another peer's connection."""
        now = self._clock.now()
        passed, self._looked_at = min(now - self._looked_at, LONGEST_LOOK_AWAY), now
        found: str | None = None
        for name, peer in self._peers.items():
            peer.waited = peer.waited + passed if peer.in_flight else 0.0
            if peer.waited >= self._write_timeout:
                found = name
        return found

    def _end_all_writes(self, stuck: str) -> list[Result]:
        """The only way out for a write that never ends: to the engine, all its writes are one."""
        log.error("a write does not end: the transfer engine is ended", peer=stuck, seconds=self._write_timeout)
        try:
            self._backend.restart()
        except TransferStuck as error:
            raise TransferStuck(
                f"no write to {stuck} has ended for {self._write_timeout:g} s: {error.message}"
            ) from error
        for peer in self._peers.values():
            peer.connected = False
        self._poll_trials()
        return self._poll_writes(stuck)

    # --- peers ---------------------------------------------------------------------------------------------------

    def _reachable(self, name: str) -> _Peer:
        """The peer, connected; connects again after a failure, once its failed writes have ended."""
        peer = self._peers.get(name)
        if peer is None:
            raise PeerUnreachable(f"{name} is not connected")
        if peer.broken:
            raise PeerUnreachable(f"an earlier write to {name} failed and others are still ending")
        if not peer.connected:
            self._require_same_digests(name, peer.descriptor)
            self._backend.connect(name, peer.descriptor, peer.part)
            peer.connected = True
        return peer

    def _require_same_digests(self, name: str, descriptor: bytes) -> None:
        device = PoolDescriptor.read(descriptor).device
        if self._digester is not None and self._digester.on_host is not (device == "cpu"):
            raise ProtocolError(
                f"the pages of {name} are in the memory of {device}, and have other digests than ours; such workers "
                "hand over to each other with kv.verify_digests=false only"
            )

    def _connect(self, command: Connect) -> None:
        """Ahead of the first write, to spare it the time; if it fails, that write will try again and tell."""
        peer = self._peers.setdefault(command.peer, _Peer(command.descriptor, command.part))
        peer.leaving = False
        new = not peer.connected
        try:
            self._reachable(command.peer)
            if new and self._trial_page is not None:
                self._try(command.peer, self._trial_page)
        except (AvailabilityError, ProtocolError):
            return

    def _try(self, name: str, trial_page: int) -> None:
        """Raises what `TransferBackend.write` raises."""
        peer = self._peers[name]
        theirs = PoolDescriptor.read(peer.descriptor).pages - 1
        self._trials.append((name, self._backend.write(name, [trial_page], [theirs])))
        peer.begin_write()

    def _poll_trials(self) -> None:
        for _ in range(len(self._trials)):
            name, handle = self._trials.popleft()
            state = handle.poll()
            if state is WriteState.PENDING:
                self._trials.append((name, handle))
            else:
                self._ended(name, failed=state is WriteState.FAILED)

    def _disconnect(self, name: str) -> None:
        peer = self._peers.get(name)
        if peer is None:
            return
        peer.leaving = True
        if peer.in_flight == 0:
            del self._peers[name]
            if peer.connected:
                self._backend.disconnect(name)

    # --- pages that others write -----------------------------------------------------------------------------------

    def _digests(self, pages: Sequence[int], part: PageSlice | None = None) -> tuple[int, ...]:
        if self._digester is None:
            return ()
        return tuple(self._digester.of(pages, None if part is None else part.ours))

    def _digests_of_parts(self, command: ComputeDigests) -> tuple[int, ...]:
        if self._digester is None or command.parts is None:
            return self._digests(command.pages)
        by_part = [self._digester.of(command.pages, runs) for runs in command.parts]
        return tuple(digest for page in zip(*by_part, strict=True) for digest in page)

    def _settle(self) -> list[Result]:
        now = self._clock.now()
        results: list[Result] = []
        for fence, settling in list(self._settling.items()):
            settling.turns -= 1
            if settling.turns <= 0 and now >= settling.until:
                del self._settling[fence]
                results.append(Settled(fence))
        return results

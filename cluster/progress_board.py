"""A page of memory that a worker's two processes share: the engine process marks its progress, its parent reads it.

Messages can't tell of progress: in a long step the engine's main thread says nothing for half a minute, and a thread
that hangs says nothing for ever. A mark costs a tenth of a microsecond and never waits. Each slot has one writing
thread and is one aligned word, so that a reader sees an old value or a new one, nothing in between.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Protocol

import msgspec

_PAGE_BYTES = mmap.PAGESIZE
_ENGINE, _TRANSFERS = 0, 1
_STEP, _TRANSFER, _SILENCE = 0, 1, 2
_MOMENTS = 64
"""Where the moments begin: a cache line behind the counters."""
_NEVER = 0.0
"""Before any moment."""


class Progress(msgspec.Struct, frozen=True):
    """What the board shows at one moment. Moments are of the host's monotonic clock."""

    engine: int = 0
    """Grows with each turn of the step loop, idle or not, and with each layer of a step."""
    transfers: int = 0
    """Grows with each look of the transfer thread at what is under way, and when nothing is, twice a second."""
    step_began: float | None = None
    """Of the step under way."""
    oldest_transfer: float | None = None
    """When the oldest transfer that is not over began."""
    silent_until: float = _NEVER
    """The engine process has said that it may show no progress until then."""


class Board(Protocol):
    """What a control process reads of one engine process, or of a group of them."""

    def read(self) -> Progress: ...

    def close(self) -> None: ...


class ProgressBoard:
    """Made by the control process with `create`, found by the engine process with `attach`. `close` unmaps it here."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        """Of the page; inherited by the engine process."""
        self._page = mmap.mmap(descriptor, _PAGE_BYTES)
        self._counters = memoryview(self._page)[:_MOMENTS].cast("q")
        self._moments = memoryview(self._page)[_MOMENTS : 2 * _MOMENTS].cast("d")

    @classmethod
    def create(cls) -> ProgressBoard:
        """All zero: no step, no transfer. Linux only."""
        descriptor = os.memfd_create("baton-progress")
        os.ftruncate(descriptor, _PAGE_BYTES)
        return cls(descriptor)

    @classmethod
    def attach(cls, descriptor: int) -> ProgressBoard:
        return cls(descriptor)

    # --- the engine process, step loop -------------------------------------------------------------------------------

    def advance(self) -> None:
        """A turn of the loop, or a layer of a step, is done."""
        self._counters[_ENGINE] += 1

    def step_begins(self, now: float) -> None:
        self._moments[_STEP] = now

    def step_ends(self) -> None:
        self._moments[_STEP] = _NEVER

    def expect_silence(self, until: float) -> None:
        """What comes now can't be told of in between: it is no stall before `until`."""
        self._moments[_SILENCE] = until

    # --- the engine process, transfer thread -------------------------------------------------------------------------

    def transfers_seen(self, oldest: float | None) -> None:
        """The thread has looked after its transfers; `oldest` is when the oldest of them began."""
        self._counters[_TRANSFERS] += 1
        self._moments[_TRANSFER] = _NEVER if oldest is None else oldest

    # --- the control process -----------------------------------------------------------------------------------------

    def read(self) -> Progress:
        return Progress(
            self._counters[_ENGINE],
            self._counters[_TRANSFERS],
            self._moments[_STEP] or None,
            self._moments[_TRANSFER] or None,
            self._moments[_SILENCE],
        )

    def close(self) -> None:
        """The page itself lives as long as a process has it."""
        self._counters.release()
        self._moments.release()
        self._page.close()
        os.close(self.descriptor)


class DistantBoard:
    """What is told of a rank on another host; `heard` is called with it."""

    def __init__(self) -> None:
        self._progress = Progress()

    def heard(self, engine: int, transfers: int, oldest_transfer: float | None) -> None:
        """The last is a moment of this host's clock, as far as it can be known."""
        self._progress = Progress(engine, transfers, oldest_transfer=oldest_transfer)

    def read(self) -> Progress:
        return self._progress

    def close(self) -> None:
        """There is nothing to be closed."""


class GroupBoard:
    """What the boards of a worker's ranks show together. A step gets on when any rank does: they wait for each other in
    it, rank 0's loop for the later stages, too. Each rank has transfers of its own; they get on when those of all ranks
    do."""

    def __init__(self, boards: Sequence[Board]) -> None:
        self._boards = boards
        self._seen = [0] * len(boards)
        self._transfers = 0

    def read(self) -> Progress:
        ranks = [board.read() for board in self._boards]
        if all(rank.transfers != seen for rank, seen in zip(ranks, self._seen, strict=True)):
            self._seen = [rank.transfers for rank in ranks]
            self._transfers += 1
        begun = [rank.oldest_transfer for rank in ranks if rank.oldest_transfer is not None]
        return msgspec.structs.replace(
            ranks[0],
            engine=sum(rank.engine for rank in ranks),
            transfers=self._transfers,
            oldest_transfer=min(begun, default=None),
        )

    def close(self) -> None:
        for board in self._boards:
            board.close()

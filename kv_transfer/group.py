"""The transfers of all ranks of a worker as one: what sender and receiver ask for once, each rank does its part of.

A write has ended when each part of it has; it has failed when one of them has. A page's digest is that of its parts'
digests, in the order of `shard_plan.parts_of`, which both ends know. So sender and receiver, and what they say to each
other, know nothing of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.layout import KVLayout
from cluster.messages import Fence
from cluster.shards import Grid
from kv_transfer.digests import combined
from kv_transfer.driver import (
    Command,
    ComputeDigests,
    Connect,
    DigestsComputed,
    Disconnect,
    ExpectWrites,
    PostWrites,
    Result,
    Settle,
    Settled,
    TransferPort,
    WritesEnded,
)
from kv_transfer.plan import Batch
from kv_transfer.shard_plan import PageSlice, Part, Runs, parts_of

NOBODY = Part(0, 0, PageSlice(Runs(0, 0), Runs(0, 0)))
"""What a peer that is not connected gets; its writes fail on rank 0."""


class RankPort(Protocol):
    """Another rank's transfers; what it has done comes among the results of rank 0's port."""

    def post(self, command: Command) -> None:
        """Never waits for the command to be carried out."""


@dataclass
class _Writes:
    """Of one batch: what has ended, by the name of the part's peer; `names` are in order."""

    names: list[str]
    ended: dict[str, WritesEnded] = field(default_factory=dict)


@dataclass
class _Digests:
    parts: list[Part]
    computed: dict[int, DigestsComputed] = field(default_factory=dict)
    """By rank."""


class TransferGroup:
    """All methods are for the step loop's thread. `first` is rank 0's own port, through which all results come."""

    def __init__(self, first: TransferPort, followers: Sequence[RankPort], layout: KVLayout) -> None:
        self._first = first
        self._ranks: list[RankPort] = [first, *followers]
        self._layout = layout
        self._parts: dict[str, list[Part]] = {}
        """Of each peer that is connected, what each of our ranks writes to each of its ranks."""
        self._writes: dict[tuple[Fence, int], _Writes] = {}
        self._digests: dict[Fence, _Digests] = {}
        self._settling: dict[Fence, int] = {}
        """Ranks that have not settled yet."""

    # --- as a sender -------------------------------------------------------------------------------------------------

    def connect(self, peer: str, descriptors: Sequence[bytes], grid: Grid) -> None:
        """`descriptors`: of each of its ranks, which are divided as in `grid`."""
        parts = self._parts[peer] = parts_of(self._layout, self._layout.grid, grid)
        whole = len(self._ranks) == len(descriptors) == 1
        for part in parts:
            slice_ = None if whole else part.slice
            self._ranks[part.source].post(Connect(_name(peer, part), descriptors[part.target], slice_))

    def disconnect(self, peer: str) -> None:
        for part in self._parts.pop(peer, []):
            self._ranks[part.source].post(Disconnect(_name(peer, part)))

    def write(self, fence: Fence, peer: str, batch: Batch) -> None:
        """Answered by one `WritesEnded`; at once, and with an error, if the peer is not connected."""
        parts = self._parts.get(peer) or [NOBODY]
        self._writes[fence, batch.first] = _Writes([_name(peer, part) for part in parts])
        for part in parts:
            self._ranks[part.source].post(PostWrites(fence, _name(peer, part), batch))

    # --- as a receiver -----------------------------------------------------------------------------------------------

    def expect(self, fence: Fence) -> None:
        for rank in self._ranks:
            rank.post(ExpectWrites(fence))

    def verify(self, fence: Fence, pages: tuple[int, ...], writers: Grid) -> None:
        """The digests of pages that a worker of such ranks has written. Answered by one `DigestsComputed`."""
        parts = parts_of(self._layout, writers, self._layout.grid)
        self._digests[fence] = _Digests(parts)
        for number, rank in enumerate(self._ranks):
            own = tuple(part.slice.theirs for part in parts if part.target == number)
            rank.post(ComputeDigests(fence, pages, own, number))

    def settle(self, fence: Fence) -> None:
        """Answered by one `Settled`."""
        self._settling[fence] = len(self._ranks)
        for rank in self._ranks:
            rank.post(Settle(fence))

    # --- answers -----------------------------------------------------------------------------------------------------

    def results(self) -> list[Result]:
        """What all ranks have ended since the last call. Raises whatever ended rank 0's thread."""
        joined = [self._join(result) for result in self._first.results()]
        return [result for result in joined if result is not None]

    def wait(self, seconds: float) -> bool:
        """See `TransferPort.wait`. What has come may be a part only."""
        return self._first.wait(seconds)

    def _join(self, result: Result) -> Result | None:
        """The whole, if this was its last part."""
        if isinstance(result, WritesEnded):
            return self._join_writes(result)
        if isinstance(result, DigestsComputed):
            return self._join_digests(result)
        return self._join_settled(result)

    def _join_settled(self, result: Settled) -> Settled | None:
        self._settling[result.fence] -= 1
        if self._settling[result.fence]:
            return None
        del self._settling[result.fence]
        return result

    def _join_writes(self, result: WritesEnded) -> WritesEnded | None:
        key = (result.fence, result.batch.first)
        writes = self._writes[key]
        writes.ended[result.peer] = result
        if len(writes.ended) < len(writes.names):
            return None
        del self._writes[key]
        if len(writes.names) == 1:
            return result
        parts = [writes.ended[name] for name in writes.names]
        error = next((part.error for part in parts if part.error is not None), None)
        return WritesEnded(
            result.fence,
            result.peer,
            result.batch,
            error,
            _by_page([part.digests for part in parts]) if error is None else (),
            min(part.started for part in parts),
            max(part.ended for part in parts),
        )

    def _join_digests(self, result: DigestsComputed) -> DigestsComputed | None:
        digests = self._digests[result.fence]
        digests.computed[result.rank] = result
        if len(digests.computed) < len(self._ranks):
            return None
        del self._digests[result.fence]
        columns = []
        for number in range(len(self._ranks)):
            own = sum(part.target == number for part in digests.parts)
            columns += [digests.computed[number].digests[column::own] for column in range(own)]
        return DigestsComputed(result.fence, _by_page(columns))


def _name(peer: str, part: Part) -> str:
    """What a rank's transfer engine calls a rank of the peer."""
    return f"{peer}/{part.source}-{part.target}"


def _by_page(parts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Each page's digest, from those of each part's pages."""
    return tuple(combined(page) for page in zip(*parts, strict=True))

"""Which workers serve a request: pure functions of a snapshot of the fleet.

A policy chooses among pairs that can hand over to each other at all (`compatible_groups`), and never among dead
workers: the snapshot holds live ones only. To add a policy: a class with `place`, its name in `PolicyName`, a line in
`POLICIES`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

from cluster.config import PolicyName
from cluster.errors import NoWorker, PromptTooLong
from cluster.messages import Member
from router.request_state import WorkerKey


class Commitment(NamedTuple):
    """What one attempt takes at a worker."""

    tokens: int
    """Prompt tokens to compute there."""
    pages: int


Kind = tuple[str, str]
"""Fingerprint of a KV layout, and a transfer engine: who has the same can hand over to each other."""


def kind_of(member: Member) -> Kind:
    """A digest is made for it: to be asked for once in a worker's life."""
    return member.layout.fingerprint, member.transfer


class Candidate(NamedTuple):
    """A live worker and its load: what others gave it as of its last heartbeat, plus what this router gave it."""

    key: WorkerKey
    member: Member
    kind: Kind
    attempts: int
    tokens: int
    """Prompt tokens that it has yet to compute."""
    pages: int
    """Pages that are taken, or promised to requests under way."""
    commitments: Collection[Commitment] = ()
    """Of this router's attempts there, as they are now: to be looked at before anything changes."""


class Snapshot(NamedTuple):
    """Live workers, in order of their names. `unified`: this cluster has no prefill pool by intent."""

    prefill: Sequence[Candidate]
    decode: Sequence[Candidate]
    unified: bool


class Need(NamedTuple):
    """What a request will take, in tokens."""

    prompt: int
    output: int


class Placement(NamedTuple):
    """`prefill` is None in a unified cluster, `decode` where the first token is the last one."""

    prefill: Candidate | None
    decode: Candidate | None


class Group(NamedTuple):
    """Workers of which any prefill can hand over to any decode, and that are large enough. A side that the request
    does not need is empty."""

    prefill: Sequence[Candidate]
    decode: Sequence[Candidate]


class Policy(Protocol):
    """Called by the fleet on the router's event loop for each choice; keeps no state."""

    def place(self, snapshot: Snapshot, need: Need, turn: int) -> Placement:
        """`turn` counts the router's placements: it breaks ties. Raises `NoWorker` or `PromptTooLong`."""


class LeastLoad:
    """The prefill worker with the fewest prompt tokens ahead, and the decode worker with the lowest share of its
    running slots or of its pages taken, whichever is scarcer."""

    def place(self, snapshot: Snapshot, need: Need, turn: int) -> Placement:
        groups = compatible_groups(snapshot, need)
        placements = [
            Placement(_least(group.prefill, _prefill_load, turn), _least(group.decode, _decode_load, turn))
            for group in groups
        ]
        return min(placements, key=lambda placement: (_of(placement.prefill), _of(placement.decode)))


class RoundRobin:
    """Each worker in turn, whatever its load."""

    def place(self, snapshot: Snapshot, need: Need, turn: int) -> Placement:
        groups = compatible_groups(snapshot, need)
        group = groups[turn % len(groups)]
        turn //= len(groups)
        # After each common round one side moves on by one: so all pairs take part, not only those of equal number.
        rounds = turn // math.lcm(max(1, len(group.prefill)), max(1, len(group.decode)))
        return Placement(_nth(group.prefill, turn), _nth(group.decode, turn + rounds))


POLICIES: Mapping[PolicyName, Policy] = MappingProxyType(
    {PolicyName.LEAST_LOAD: LeastLoad(), PolicyName.ROUND_ROBIN: RoundRobin()}
)


def compatible_groups(snapshot: Snapshot, need: Need) -> list[Group]:
    """Never empty. Raises `NoWorker`, saying what is missing, or `PromptTooLong` if every pool is too small."""
    needs_prefill, needs_decode = not snapshot.unified, snapshot.unified or need.output > 1
    if needs_prefill and not snapshot.prefill:
        raise NoWorker("no prefill worker is live")
    if needs_decode and not snapshot.decode:
        raise NoWorker("no decode worker is live")
    kinds = dict.fromkeys(candidate.kind for candidate in (*snapshot.prefill, *snapshot.decode))
    groups = [
        Group(
            [candidate for candidate in snapshot.prefill if needs_prefill and candidate.kind == kind],
            [candidate for candidate in snapshot.decode if needs_decode and candidate.kind == kind],
        )
        for kind in kinds
    ]
    groups = [group for group in groups if _complete(group, needs_prefill, needs_decode)]
    if not groups:
        raise NoWorker(f"no live prefill worker can hand over to a live decode worker: {_layouts(snapshot)}")
    fitting = [_large_enough(group, need) for group in groups]
    fitting = [group for group in fitting if _complete(group, needs_prefill, needs_decode)]
    if not fitting:
        capacity = max(_capacity(candidate) for group in groups for candidate in (*group.prefill, *group.decode))
        raise PromptTooLong(
            f"the prompt has {need.prompt} tokens and up to {need.output} more were asked for, "
            f"but the largest KV pool holds {capacity}",
            param="max_tokens",
        )
    return fitting


def _complete(group: Group, needs_prefill: bool, needs_decode: bool) -> bool:
    return (not needs_prefill or bool(group.prefill)) and (not needs_decode or bool(group.decode))


def _layouts(snapshot: Snapshot) -> str:
    def describe(candidate: Candidate) -> str:
        layout = candidate.member.layout
        return f"{candidate.key} has layout {layout.fingerprint} ({layout.dtype}, page size {layout.page_size})"

    each = (f"{describe(candidate)} and transfer {candidate.member.transfer}" for candidate in
            (*snapshot.prefill, *snapshot.decode))  # fmt: skip
    return "; ".join(each)


def _capacity(candidate: Candidate) -> int:
    """Tokens that its pool holds."""
    return candidate.member.pool_pages * candidate.member.layout.page_size


def _large_enough(group: Group, need: Need) -> Group:
    return Group(
        [candidate for candidate in group.prefill if _capacity(candidate) >= need.prompt],
        [candidate for candidate in group.decode if _capacity(candidate) >= need.prompt + need.output],
    )


def _prefill_load(candidate: Candidate) -> tuple[float, float]:
    return candidate.tokens, candidate.attempts


def _decode_load(candidate: Candidate) -> tuple[float, float]:
    slots = candidate.attempts / candidate.member.max_running
    return max(slots, candidate.pages / candidate.member.pool_pages), slots


class _Load(Protocol):
    def __call__(self, candidate: Candidate) -> tuple[float, float]: ...


def _least(candidates: Sequence[Candidate], load: _Load, turn: int) -> Candidate | None:
    """Among equals another one at each turn, so that several routers, and idle times, spread."""
    if not candidates:
        return None
    first = turn % len(candidates)
    return min((*candidates[first:], *candidates[:first]), key=load)


def _nth(candidates: Sequence[Candidate], turn: int) -> Candidate | None:
    return candidates[turn % len(candidates)] if candidates else None


def _of(candidate: Candidate | None) -> tuple[float, float]:
    """A side's load, to compare groups."""
    if candidate is None:
        return 0.0, 0.0
    return candidate.tokens / max(1, _capacity(candidate)), candidate.attempts / candidate.member.max_running

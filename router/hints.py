"""Whom a placement avoids and whom it prefers: a snapshot of the fleet is narrowed before a policy sees it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cluster.messages import Role
from router.policies import Candidate, Snapshot
from router.request_state import WorkerKey


class Hints(NamedTuple):
    """None of them leaves a request without a place: where nobody else is left, anyone will do."""

    avoid: frozenset[WorkerKey] = frozenset()
    """Lives of workers that this request was let down by."""
    keep: frozenset[WorkerKey] = frozenset()
    """Those that have some of its KV."""
    shut: frozenset[tuple[str, Role]] = frozenset()
    """Workers and legs that have failed others, see `router.breaker_state`."""


NO_HINTS = Hints()


def narrowed(snapshot: Snapshot, hints: Hints) -> Snapshot:
    """The candidates that remain, on each side by itself: an empty side stays empty, any other has one at least."""

    def side(candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        wanted: tuple[Callable[[Candidate], bool], ...] = (
            lambda candidate: (candidate.key.worker, candidate.member.role) not in hints.shut,
            lambda candidate: candidate.key not in hints.avoid,
            lambda candidate: candidate.key in hints.keep,
        )
        for condition in wanted:
            candidates = [candidate for candidate in candidates if condition(candidate)] or candidates
        return candidates

    return snapshot._replace(prefill=side(snapshot.prefill), decode=side(snapshot.decode))

"""Who goes first: pure functions of a sequence and the time. To add one: a class here, its name in `cluster.config`.

Ranks are compared, the smallest goes first, and among equals whoever came first. Every policy promises that nobody
waits for ever:

- Under `Priority` a level of urgency is worth `ageing_seconds` of earlier arrival. A sequence's rank never changes, so
  only what arrives within (difference of levels) x `ageing_seconds` can go before it.
- Under the others, who has waited for `ageing_seconds` goes before all that have not, in order of arrival. So does who
  was interrupted: it had its turn already, and so did everybody who goes before somebody else for this reason.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from cluster.config import SchedulingPolicy
from engine.prefix_cache import PrefixCache
from engine.sequence import Sequence


class Rank(NamedTuple):
    due: int
    """0: its time has come, whatever the policy prefers; else 1."""
    preference: float
    arrived: float


class Policy(Protocol):
    """Asked on the step loop's thread, for each queue there is: for entry, for pages, for a step's prompt tokens."""

    def rank(self, sequence: Sequence, now: float) -> Rank:
        """Of a sequence that has not ended. Quick: it is asked for each that waits, at each step."""


class FirstCome:
    """In order of arrival."""

    def rank(self, sequence: Sequence, now: float) -> Rank:
        return Rank(0 if sequence.interrupted else 1, 0.0, sequence.arrived)


class Priority:
    """The most urgent first."""

    def __init__(self, ageing_seconds: float) -> None:
        self._ageing_seconds = ageing_seconds

    def rank(self, sequence: Sequence, now: float) -> Rank:
        return Rank(0, sequence.arrived - sequence.priority * self._ageing_seconds, sequence.arrived)


class ShortestFirst:
    """The fewest tokens to compute first: the least mean wait."""

    def __init__(self, ageing_seconds: float) -> None:
        self._ageing_seconds = ageing_seconds

    def rank(self, sequence: Sequence, now: float) -> Rank:
        return _aged(sequence, now, self._ageing_seconds, sequence.pending)


class LongestFirst:
    """The most tokens first: long prompts don't end up alone at the end."""

    def __init__(self, ageing_seconds: float) -> None:
        self._ageing_seconds = ageing_seconds

    def rank(self, sequence: Sequence, now: float) -> Rank:
        return _aged(sequence, now, self._ageing_seconds, -sequence.length)


class LongestPrefix:
    """The most cached tokens first: before they are evicted."""

    def __init__(self, ageing_seconds: float, prefixes: PrefixCache) -> None:
        self._ageing_seconds = ageing_seconds
        self._prefixes = prefixes

    def rank(self, sequence: Sequence, now: float) -> Rank:
        return _aged(sequence, now, self._ageing_seconds, -self._cached_pages(sequence))

    def _cached_pages(self, sequence: Sequence) -> int:
        return sequence.cached if sequence.pages else self._prefixes.present(sequence.chain_by(self._prefixes.chain))


def make_policy(name: SchedulingPolicy, ageing_seconds: float, prefixes: PrefixCache) -> Policy:
    """`prefixes` are those of the engine whose queues it orders."""
    if name is SchedulingPolicy.PRIORITY:
        return Priority(ageing_seconds)
    if name is SchedulingPolicy.SHORTEST_FIRST:
        return ShortestFirst(ageing_seconds)
    if name is SchedulingPolicy.LONGEST_FIRST:
        return LongestFirst(ageing_seconds)
    if name is SchedulingPolicy.LONGEST_PREFIX:
        return LongestPrefix(ageing_seconds, prefixes)
    return FirstCome()


def _aged(sequence: Sequence, now: float, ageing_seconds: float, preference: float) -> Rank:
    if sequence.interrupted or now - sequence.arrived >= ageing_seconds:
        return Rank(0, 0.0, sequence.arrived)
    return Rank(1, preference, sequence.arrived)

"""Who goes first under each policy, and that nobody waits for ever under any."""

from __future__ import annotations

import pytest

from cluster.config import SchedulingPolicy
from cluster.messages import Sampling
from engine.commitment import Commitments
from engine.pacing import Pacing
from engine.pages import Owner, OwnerKind, PageLedger
from engine.policies import make_policy
from engine.prefix_cache import PrefixCache
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from tests.unit.engine.committing import commit

PAGE = 4
AGEING = 10.0
STEP = 1.0


def sequence(key, prompt, *, arrived=0.0, priority=0, attempt=1):
    tokens = prompt if isinstance(prompt, list) else [1] * prompt
    sampling = Sampling(max_tokens=1, seed=0)
    return Sequence(key, tokens, [], sampling, arrived=arrived, priority=priority, attempt=attempt)


class World:
    """One sequence fits at a time, so that the order of entry is the policy's."""

    def __init__(self, policy: SchedulingPolicy, *, max_running: int = 1, chunk_tokens: int = 64) -> None:
        self.ledger = PageLedger(64)
        self.prefixes = PrefixCache(self.ledger, PAGE)
        ordering = make_policy(policy, AGEING, self.prefixes)
        self.scheduler = Scheduler(
            self.ledger, self.prefixes, PAGE, max_running, ordering, Pacing(chunk_tokens), Commitments(1.0)
        )

    def step(self, now: float) -> list[str]:
        """Who was in the step; whoever finishes is released."""
        plan = self.scheduler.plan(now)
        if plan is None:
            return []
        keys = [chunk.sequence.key for chunk in plan.chunks]
        sampling = [one.key for one in plan.sampling]
        for key, reason in zip(sampling, commit(self.scheduler, plan, [0] * len(sampling)), strict=True):
            if reason:
                self.prefixes.release(key)
                self.ledger.release(Owner(OwnerKind.SEQUENCE, key))
        return keys

    def order(self, *sequences: Sequence, now: float = 5.0) -> str:
        for one in sequences:
            self.scheduler.submit(one)
        found = ""
        while keys := self.step(now):
            found += "".join(keys)
        return found


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (SchedulingPolicy.FIRST_COME, "abcd"),
        (SchedulingPolicy.SHORTEST_FIRST, "bdac"),
        (SchedulingPolicy.LONGEST_FIRST, "cadb"),
        (SchedulingPolicy.PRIORITY, "dcab"),
    ],
)
def test_the_order_of_each_policy(policy, expected):
    queue = [
        sequence("a", 30, arrived=0.0),
        sequence("b", 10, arrived=1.0),
        sequence("c", 40, arrived=2.0, priority=1),
        sequence("d", 20, arrived=3.0, priority=2),
    ]
    assert World(policy).order(*queue) == expected


def test_the_longest_cached_beginning_goes_first():
    world = World(SchedulingPolicy.LONGEST_PREFIX)
    known = list(range(40))
    world.order(sequence("x", known))
    others = [sequence("a", [7] * 40), sequence("b", [*known[:16], 7]), sequence("c", [*known[:32], 7, 7])]
    assert world.order(*others) == "cba"


def test_equals_go_in_order_of_arrival():
    for policy in SchedulingPolicy:
        assert World(policy).order(*(sequence(key, 8, arrived=2.0) for key in "abcd")) == "abcd", policy


def test_who_was_interrupted_goes_on_before_others_begin():
    for policy in SchedulingPolicy:
        interrupted = sequence("b", 20, arrived=4.0, attempt=2)
        queue = [sequence("a", 20, arrived=4.0), interrupted]
        expected = "ab" if policy is SchedulingPolicy.PRIORITY else "ba"
        assert World(policy).order(*queue) == expected, policy


PREFERRED = {
    SchedulingPolicy.FIRST_COME: {"prompt": 30},
    SchedulingPolicy.SHORTEST_FIRST: {"prompt": 1},
    SchedulingPolicy.LONGEST_FIRST: {"prompt": 60},
    SchedulingPolicy.LONGEST_PREFIX: {"prompt": list(range(40))},
    SchedulingPolicy.PRIORITY: {"prompt": 30, "priority": 3},
}
"""What each policy prefers to a request of 30 other tokens."""


@pytest.mark.parametrize("policy", SchedulingPolicy)
def test_nobody_waits_for_ever(policy):
    """Two preferred requests arrive for each that can be served, without end; one is not preferred."""
    world = World(policy)
    world.order(sequence("cached", list(range(40))))
    world.scheduler.submit(sequence("patient", [9] * 30, arrived=0.0))
    levels = PREFERRED[policy].get("priority", 1)
    bound = 3 * (AGEING * levels / STEP + 2)
    for number in range(int(bound)):
        now = number * STEP
        for twin in "ab":
            world.scheduler.submit(sequence(f"{number}{twin}", **{"arrived": now, **PREFERRED[policy]}))
        if "patient" in world.step(now):
            assert policy is SchedulingPolicy.FIRST_COME or now >= AGEING, "the policy was not followed"
            return
    raise AssertionError(f"still waiting after {bound} steps")


@pytest.mark.parametrize("policy", [SchedulingPolicy.SHORTEST_FIRST, SchedulingPolicy.PRIORITY])
def test_a_step_gives_its_prompt_tokens_in_the_same_order(policy):
    """A long prompt that is being computed lets a short, or urgent, one pass, and is not starved by many of them."""
    world = World(policy, max_running=100, chunk_tokens=8)
    world.scheduler.submit(sequence("long", 60))
    assert world.step(0.0) == ["long"]
    world.scheduler.submit(sequence("s", [2] * 8, arrived=1.0, priority=1))
    assert world.step(1.0) == ["s"]
    for number in range(2, 50):
        world.scheduler.submit(sequence(f"s{number}", [number + 1] * 8, arrived=float(number), priority=1))
        if "long" in world.step(float(number)):
            assert AGEING <= number <= AGEING + 2
            return
    raise AssertionError("the long prompt was starved")

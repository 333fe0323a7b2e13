"""Entering by estimate, growing, retraction: what the scheduler does when sequences outgrow the pool."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import SchedulingPolicy
from cluster.messages import FinishReason, Sampling
from engine.commitment import LEAST, Commitments
from engine.pacing import Pacing
from engine.pages import Owner, OwnerKind, PageLedger
from engine.policies import make_policy
from engine.prefix_cache import PrefixCache
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from tests.unit.engine.committing import commit

PAGE = 4
STOP = 7


class World:
    """A scheduler that has seen short answers only, and whose owner resumes what it retracts, as the router does."""

    def __init__(
        self,
        pages: int,
        *,
        max_running: int = 8,
        chunk_tokens: int = 16,
        policy: SchedulingPolicy = SchedulingPolicy.FIRST_COME,
        cache: bool = True,
        retract_every_steps: int = 0,
        delay_seconds: float = 0.0,
    ) -> None:
        self.ledger = PageLedger(pages)
        self.prefixes = PrefixCache(self.ledger, PAGE, enabled=cache)
        commitments = Commitments(0.9)
        for _ in range(50):
            commitments.ended(1, cut_off=False)
        self.scheduler = Scheduler(
            self.ledger,
            self.prefixes,
            PAGE,
            max_running,
            make_policy(policy, 10.0, self.prefixes),
            Pacing(chunk_tokens, 0.5, delay_seconds),
            commitments,
            retract_every_steps,
        )
        self.live: dict[str, Sequence] = {}
        self.attempts: dict[str, int] = {}
        self.retracted: list[str] = []
        self.finished: list[str] = []
        self.now = 0.0

    def submit(self, name: str, prompt: int, max_tokens: int, output: int = 0) -> None:
        attempt = self.attempts[name] = self.attempts.get(name, 0) + 1
        # Prompts share beginnings, by their first letters.
        tokens = [ord(name[0])] * (prompt // 2) + [sum(map(ord, name)) + 200] * (prompt - prompt // 2)
        sampling = Sampling(max_tokens=max_tokens, seed=0, stop_token_ids=[STOP])
        self.live[name] = Sequence(name, tokens, [1] * output, sampling, arrived=self.now, attempt=attempt)
        self.scheduler.submit(self.live[name])

    def make_room(self, *, resume: bool = True) -> list[str]:
        """Retracts whom the scheduler names, until it has enough."""
        names = []
        while (victim := self.scheduler.retract()) is not None:
            before = self.prefixes.available
            self.release(victim.key)
            assert self.prefixes.available >= before
            names.append(victim.key)
            if resume:
                self.submit(victim.key, len(victim.prompt), victim.sampling.max_tokens, len(victim.output))
        self.retracted += names
        self.ledger.check()
        self.prefixes.check()
        return names

    def step(self, token: int = 1) -> dict[str, tuple[int, int]]:
        self.make_room()
        self.now += 1.0
        plan = self.scheduler.plan(self.now)
        if plan is None:
            return {}
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.computed < chunk.stop <= len(chunk.sequence.pages) * PAGE
        keys = [one.key for one in plan.sampling]
        for key, reason in zip(keys, commit(self.scheduler, plan, [token] * len(keys)), strict=True):
            if reason:
                self.finished.append(key)
                self.release(key)
        return {chunk.sequence.key: (chunk.start, chunk.stop) for chunk in plan.chunks}

    def release(self, key: str) -> None:
        self.prefixes.release(key)
        self.ledger.release(Owner(OwnerKind.SEQUENCE, key))
        del self.live[key]

    def until_idle(self, most: int = 50_000) -> None:
        """`most` is far more than it ever takes, even if each attempt computes all tokens again to give one."""
        for _ in range(most):
            if not self.live:
                return
            self.step()
        raise AssertionError(f"still there: {sorted(self.live)}")


def test_a_sequence_enters_with_what_answers_need_and_grows_page_by_page():
    world = World(100)
    world.submit("a", 8, 390)
    world.step()
    assert len(world.live["a"].pages) == (8 + LEAST) // PAGE
    for _ in range(LEAST + 1):
        world.step()
    assert world.live["a"].length == 8 + LEAST + 2
    assert len(world.live["a"].pages) == (8 + LEAST) // PAGE + 1
    assert world.retracted == []


def test_absurd_limits_do_not_keep_others_out():
    world = World(100, max_running=100)
    for name in "abcdef":
        world.submit(name, 8, 300)
    world.step()
    assert world.scheduler.running == 6, "by their limits, one would have filled the pool"


def test_the_youngest_is_retracted_and_comes_back_with_more():
    world = World(30, cache=False)
    world.submit("a", 8, 80)
    world.step()
    world.submit("b", 8, 80)
    while not world.retracted:
        world.step()
    assert world.retracted == ["b"]
    kept = world.live["b"]
    assert (kept.attempt, len(kept.output) > LEAST) == (2, True)
    world.until_idle()
    assert world.finished == ["a", "b"], "the oldest never stopped"
    assert world.attempts == {"a": 1, "b": 2}


def test_who_has_all_its_pages_is_never_retracted():
    world = World(26, cache=False)
    world.submit("grows", 8, 90)
    world.step()
    world.submit("whole", 8, 20)
    world.step()
    assert {name: len(one.pages) for name, one in world.live.items()} == {"grows": 10, "whole": 7}
    world.submit("grows too", 8, 90)
    while "whole" in world.live:
        world.step()
    assert "whole" not in world.retracted


def test_a_newcomer_leaves_a_page_for_each_that_may_grow():
    world = World(25, cache=False)
    for name in "ab":
        world.submit(name, 8, 90)
        world.step()
    assert world.prefixes.available == 5
    world.submit("four pages", 10, 4)
    world.step()
    assert world.scheduler.running == 2, "two of the five pages are not for newcomers"
    world.scheduler.cancel("b")
    world.release("b")
    world.step()
    assert world.scheduler.running == 2


def test_a_retracted_sequence_finds_its_own_pages_again():
    world = World(40, retract_every_steps=6)
    world.submit("a", 30, 12)
    while not world.retracted:
        world.step()
    produced = len(world.live["a"].output)
    world.step()
    assert world.live["a"].cached >= (30 + produced - 1) // PAGE * PAGE - PAGE


def test_a_lease_is_of_the_tokens_kv_and_of_what_the_answer_will_need():
    world = World(100)
    offered = Sequence("a", list(range(10)), [], Sampling(max_tokens=400, seed=0))
    lease = world.scheduler.lease(offered)
    assert (len(lease.pages), lease.skip_tokens) == (3, 0)
    assert world.ledger.counts()["lease"] == 3
    assert world.ledger.counts()["reserved"] == -(-(10 + LEAST) // PAGE) - 3


def test_a_lease_that_does_not_fit_takes_nothing():
    world = World(12)
    world.submit("a", 8, 20)
    world.step()
    used = world.ledger.used
    offered = Sequence("b", list(range(10)), [], Sampling(max_tokens=400, seed=0))
    assert world.scheduler.lease(offered) is None
    world.prefixes.check()
    assert world.ledger.used == used


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("cache", [True, False])
def test_forced_retraction_lets_everybody_through(every, cache):
    world = World(200, retract_every_steps=every, cache=cache)
    for name in "abcd":
        world.submit(name, 40, 10)
    world.until_idle()
    assert sorted(world.finished) == list("abcd") and len(world.retracted) > 2


def test_retraction_waits_for_nobody_when_there_are_pages_enough():
    world = World(400, max_running=20)
    for number in range(20):
        world.submit(f"{number}", 10, 60)
    world.until_idle()
    assert world.retracted == []


requests = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 120), st.integers(0, 30)), min_size=1, max_size=14)


@settings(max_examples=80, deadline=None)
@given(
    requests,
    st.integers(40, 70),
    st.sampled_from(SchedulingPolicy),
    st.integers(1, 6),
    st.booleans(),
    st.sampled_from([0, 5]),
    st.sampled_from([0.0, 4.0]),
)
def test_everybody_gets_through_and_no_page_is_lost(wanted, pages, policy, max_running, cache, every, delay):
    """Whatever arrives when, under each policy: the ledger adds up after each step, and attempts are few."""
    world = World(
        pages,
        policy=policy,
        max_running=max_running,
        cache=cache,
        retract_every_steps=every,
        delay_seconds=delay,
    )
    names = [f"{'xyz'[number % 3]}{number}" for number in range(len(wanted))]
    for tick in range(31):
        for name, (prompt, max_tokens, when) in zip(names, wanted, strict=True):
            if when == tick:
                world.submit(name, prompt, max_tokens)
        world.step()
    world.until_idle()
    assert sorted(world.finished) == sorted(names)
    assert world.prefixes.available == pages
    assert (world.scheduler.running, world.scheduler.queued, world.scheduler.queued_tokens) == (0, 0, 0)
    if not every:
        assert max(world.attempts.values()) <= 4, "32 tokens, then 64, then all of at most 128"


def test_a_stop_token_ends_a_grown_sequence_as_any_other():
    world = World(30)
    world.submit("a", 4, 100)
    for _ in range(LEAST + 10):
        world.step()
    assert len(world.live["a"].output) > LEAST
    world.step(STOP)
    assert world.finished == ["a"] and world.prefixes.available == 30


def test_a_plan_without_room_leaves_out_whom_it_can_not_serve():
    """Nobody asked for a retraction: who has no page for its next token waits, the others go on."""
    world = World(20, cache=False)
    world.submit("a", 8, 60)
    commit(world.scheduler, world.scheduler.plan(), [1])
    hog = Owner(OwnerKind.QUARANTINE, "others")
    world.prefixes.allocate(hog, world.prefixes.available)
    reasons: list[FinishReason | None] = []
    while (plan := world.scheduler.plan()) is not None:
        reasons += commit(world.scheduler, plan, [1])
    assert world.live["a"].length == 8 + LEAST + 1
    world.ledger.release(hog)
    assert world.scheduler.plan() is not None and not any(reasons)

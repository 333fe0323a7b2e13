"""Who is let in, who is refused, who makes way: decided by bounds, deadlines and priorities, and nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import RouterLimits, SchedulingPolicy
from cluster.errors import Overloaded
from router.admission import LONGEST_RETRY_SECONDS, AdmissionQueue, Rate, Ticket

FAR = 1e9


def queue(policy: SchedulingPolicy = SchedulingPolicy.FIRST_COME, **limits) -> AdmissionQueue:
    return AdmissionQueue(RouterLimits(**limits), policy)


def ticket(tokens: int = 100, *, choices: int = 1, priority: int = 0, deadline: float = FAR) -> Ticket:
    return Ticket(choices, tokens, priority, deadline)


def refused(into: AdmissionQueue, who: Ticket, now: float) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        into.enter(who, now)
    assert into.integrity_errors() == []
    return caught.value


def served(into: AdmissionQueue, tokens: int, seconds: float, now: float) -> float:
    """One request after the other goes through, each of so many tokens in so many seconds. Returns the time after."""
    for _ in range(20):
        one, other = ticket(tokens), ticket(tokens)
        for each in (one, other):
            into.enter(each, now)
        for each in (one, other):
            now += seconds
            into.begin(each, tokens, now)
        for each in (one, other):
            into.leave(each, now)
    return now


def test_choices_are_bounded_and_an_end_makes_room():
    inside = queue(choices=3)
    first = ticket(choices=2)
    inside.enter(first, 0.0)
    inside.enter(ticket(), 0.0)
    refusal = refused(inside, ticket(), 0.0)
    assert (refusal.status, refusal.reason) == (429, "choices") and "the limit is 3" in refusal.message
    inside.leave(first, 1.0)
    assert inside.enter(ticket(choices=2), 1.0) == []


def test_waiting_tokens_are_bounded_and_a_beginning_makes_room():
    inside = queue(queued_tokens=250)
    first = ticket()
    inside.enter(first, 0.0)
    inside.enter(ticket(), 0.0)
    assert refused(inside, ticket(), 0.0).reason == "queued_tokens"
    inside.begin(first, 100, 1.0)
    assert inside.enter(ticket(), 1.0) == []


def test_who_would_be_alone_is_let_in_however_large():
    inside = queue(choices=1, queued_tokens=10)
    assert inside.enter(ticket(10_000, choices=64, deadline=0.1), 0.0) == []


def test_a_request_that_can_not_be_begun_in_time_is_refused_at_once_and_a_patient_one_is_not():
    inside = queue()
    now = served(inside, tokens=100, seconds=1.0, now=0.0)  # 100 tokens a second
    for _ in range(5):
        inside.enter(ticket(200), now)
    refusal = refused(inside, ticket(deadline=now + 5), now)
    assert refusal.reason == "wait" and "about 10 s" in refusal.message and refusal.retry_after in (5, 6)
    assert inside.enter(ticket(deadline=now + 15), now) == []


def test_the_clusters_own_patience_counts_too():
    inside = queue(queue_seconds=3.0)
    now = served(inside, tokens=100, seconds=1.0, now=0.0)
    inside.enter(ticket(250), now)
    inside.enter(ticket(250), now)
    assert refused(inside, ticket(), now).retry_after in (2, 3)


def test_retry_after_follows_the_queues_own_rate():
    fast, slow = queue(queued_tokens=3000), queue(queued_tokens=3000)
    for inside, seconds in ((fast, 0.1), (slow, 1.0)):
        now = served(inside, tokens=100, seconds=seconds, now=0.0)
        for _ in range(30):
            inside.enter(ticket(), now)
        assert refused(inside, ticket(500), now).retry_after == pytest.approx(500 * seconds / 100, abs=1)


def test_a_queue_that_stands_still_takes_nobody_in_a_hurry_and_recovers():
    inside = queue(queue_seconds=60.0)
    now = served(inside, tokens=100, seconds=0.1, now=0.0)
    stuck = ticket()
    inside.enter(stuck, now)
    now += 300
    assert refused(inside, ticket(10, deadline=now + 20), now).retry_after == LONGEST_RETRY_SECONDS
    inside.begin(stuck, 100, now)
    for _ in range(3):
        now = served(inside, tokens=100, seconds=0.1, now=now)
    inside.enter(ticket(1000), now)
    assert inside.enter(ticket(deadline=now + 10), now) == []


def test_a_higher_priority_takes_the_place_of_the_lowest_and_of_equals_of_the_youngest():
    inside = queue(choices=4)
    tickets = [ticket(priority=priority) for priority in (1, -5, -5, 3)]
    for each in tickets:
        inside.enter(each, 0.0)
    assert inside.enter(ticket(priority=2), 1.0) == [tickets[2]]
    assert inside.enter(ticket(priority=2), 1.0) == [tickets[1]]
    assert inside.enter(ticket(priority=2), 1.0) == [tickets[0]]
    assert refused(inside, ticket(priority=2), 1.0).reason == "choices", "equals don't make way"
    assert inside.integrity_errors() == []


def test_what_has_begun_never_makes_way_and_nobody_does_in_vain():
    inside = queue(choices=3)
    begun, waiting = ticket(choices=2, priority=-9), ticket(priority=-9)
    for each in (begun, waiting):
        inside.enter(each, 0.0)
    inside.begin(begun, 50, 0.5)
    refused(inside, ticket(choices=2, priority=9), 1.0)
    assert inside.choices == 3, "the one that waits would not have been enough"
    assert inside.enter(ticket(priority=9), 1.0) == [waiting]


def test_under_priority_those_of_lower_priority_are_computed_after_it():
    inside = queue(SchedulingPolicy.PRIORITY, queue_seconds=5.4)
    now = served(inside, tokens=100, seconds=1.0, now=0.0)
    for _ in range(6):
        inside.enter(ticket(priority=-1), now)
    refused(inside, ticket(priority=-1), now)
    assert inside.enter(ticket(priority=0), now) == [], "nobody has to make way"


@pytest.mark.parametrize(
    ("policy", "fits", "waits_too_long"),
    [
        (SchedulingPolicy.SHORTEST_FIRST, 10, 5000),
        (SchedulingPolicy.LONGEST_FIRST, 5000, 10),
    ],
)
def test_only_who_is_computed_before_makes_a_request_wait(policy, fits, waits_too_long):
    inside = queue(policy)
    now = served(inside, tokens=100, seconds=1.0, now=0.0)
    for _ in range(10):
        inside.enter(ticket(200), now)
    assert inside.enter(ticket(fits, deadline=now + 5), now) == []
    assert refused(inside, ticket(waits_too_long, deadline=now + 5), now).reason == "wait"


def test_a_prompt_that_turns_out_longer_is_measured_again():
    inside = queue(queued_tokens=300)
    guess = ticket(100)
    inside.enter(ticket(150), 0.0)
    inside.enter(guess, 0.0)
    with pytest.raises(Overloaded):
        inside.resize(guess, 200, 0.1)
    assert (inside.choices, inside.tokens) == (1, 150)
    inside.leave(guess, 0.2)
    assert (inside.choices, inside.tokens, inside.integrity_errors()) == (1, 150, [])


def test_a_rate_that_has_seen_nothing_says_nothing_and_idle_time_does_not_count():
    rate = Rate()
    assert rate.seconds_for(100) is None
    rate.advance(1.0, busy=False)
    rate.advance(2.0, busy=True)
    rate.add(50)
    assert rate.seconds_for(100) == pytest.approx(2.0, rel=0.1)
    rate.advance(10.0, busy=False)
    assert rate.seconds_for(100) == pytest.approx(2.0, rel=0.1)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "begin", "leave", "resize"]),
        st.integers(0, 9),
        st.integers(0, 400),
        st.integers(1, 4),
        st.integers(-2, 2),
        st.floats(0, 5),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(STEPS, st.sampled_from(list(SchedulingPolicy)))
def test_whatever_happens_the_books_balance_and_the_bounds_hold(steps, policy):
    inside, now, known, retries = queue(policy, choices=8, queued_tokens=900, queue_seconds=20.0), 0.0, [], []
    for action, which, tokens, choices, priority, seconds in steps:
        now += seconds
        who = known[which % len(known)] if known else None
        try:
            if action == "enter" or who is None:
                who = ticket(tokens, choices=choices, priority=priority, deadline=now + 30)
                known.append(who)
                displaced = inside.enter(who, now)
                assert all(not victim.begun and victim.priority < priority for victim in displaced)
                assert inside.choices <= 8 or inside.choices == who.choices
                assert inside.tokens <= 900 or inside.tokens == who.waiting
            elif action == "begin":
                inside.begin(who, tokens, now)
            elif action == "resize" and not who.begun:
                inside.resize(who, tokens, now)
            else:
                inside.leave(who, now)
        except Overloaded as refusal:
            retries.append(refusal.retry_after)
        assert inside.integrity_errors() == []
    assert all(1 <= seconds <= LONGEST_RETRY_SECONDS for seconds in retries)
    for who in known:
        inside.leave(who, now)
    assert (inside.choices, inside.tokens) == (0, 0)


def test_the_oldest_wait_is_of_those_that_have_not_begun():
    queue = AdmissionQueue(RouterLimits(), SchedulingPolicy.FIRST_COME)
    first, second = (Ticket(1, 10, priority, 99.0, arrived=at) for priority, at in ((0, 1.0), (5, 3.0)))
    assert queue.oldest_wait(9.0) == 0
    queue.enter(first, 1.0)
    queue.enter(second, 3.0)
    queue.resize(first, 20, 4.0)
    assert queue.oldest_wait(9.0) == 8.0, "it is as old as it was before its prompt was measured"
    queue.begin(first, 20, 9.0)
    assert queue.oldest_wait(9.0) == 6.0

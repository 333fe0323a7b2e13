"""When a prompt is prefilled where it decodes: by what either way costs those who wait."""

from __future__ import annotations

import pytest

from cluster.config import BreakEven, SchedulingPolicy
from cluster.errors import NoWorker
from cluster.messages import Speed
from router.break_even import BreakEvenPolicy
from router.policies import LeastLoad, Need
from router.request_state import WorkerKey
from tests.unit.router.test_policies import beat, chosen, fence, fleet, member

SPEED = Speed(step_seconds=0.010, prompt_token_seconds=0.001, prompt_tokens_beside_decodes=16)
"""A step of 10 ms; a prompt of 100 tokens takes 100 ms alone, and beside decodes 7 steps of up to 26 ms."""
SHORT, LONG = Need(100, 50), Need(400, 50)
PAIR, ALONE = ("p0", "d0"), (None, "d0")


def policy(order: SchedulingPolicy = SchedulingPolicy.FIRST_COME, **settings) -> BreakEvenPolicy:
    return BreakEvenPolicy(LeastLoad(), BreakEven(**settings), order)


def one_pair(speed: Speed | None = SPEED):
    return fleet(member("p0", speed=speed), member("d0", speed=speed))


def give(view, worker: str, name: str, prompt: int, *, prefills: bool) -> None:
    view.commit(WorkerKey(worker, 1), fence(name), prompt, 50, prefills=prefills)


def test_an_idle_decode_worker_spares_the_handoff():
    assert chosen(policy(), one_pair(), SHORT) == ALONE


def test_those_who_decode_are_not_disturbed_for_an_idle_prefill_worker():
    view = one_pair()
    for name in "abcd":
        give(view, "d0", name, 100, prefills=False)
    assert chosen(policy(), view, SHORT) == PAIR


def test_a_queue_at_prefill_is_worth_some_disturbance_and_a_long_prompt_disturbs_more():
    view = one_pair()
    for name in "ab":
        give(view, "d0", name, 100, prefills=False)
    give(view, "p0", "c", 450, prefills=True)
    assert chosen(policy(), view, SHORT) == ALONE, "0.55 s against 0.16 s and 0.2 s of delays"
    assert chosen(policy(), view, LONG) == PAIR, "0.85 s against 0.65 s and 0.8 s of delays"
    assert chosen(policy(delay_weight=0.2), view, LONG) == ALONE, "for who cares less about gaps"


def test_short_prompts_don_t_wait_for_long_ones_where_the_shortest_goes_first():
    view = one_pair()
    give(view, "d0", "a", 100, prefills=False)
    give(view, "d0", "b", 100, prefills=False)
    give(view, "p0", "c", 450, prefills=True)
    assert chosen(policy(SchedulingPolicy.SHORTEST_FIRST), view, SHORT) == PAIR
    beat(view, "p0", queued=5, queued_tokens=2000)
    assert chosen(policy(SchedulingPolicy.SHORTEST_FIRST), view, SHORT) == ALONE, "others' prompts may be short, too"


def test_what_is_computed_keeps_nobody_waiting():
    view = one_pair()
    give(view, "d0", "a", 500, prefills=True)
    assert chosen(policy(), view, SHORT) == PAIR, "it would wait for 500 tokens in small chunks"
    view.prefilled(WorkerKey("d0", 1), fence("a"))
    give(view, "p0", "b", 450, prefills=True)
    assert chosen(policy(), view, SHORT) == ALONE
    view.prefilled(WorkerKey("p0", 1), fence("b"))
    assert chosen(policy(), view, SHORT) == PAIR
    assert view.integrity_errors() == []


def test_without_a_prefill_worker_decode_workers_do_it_all():
    view = fleet(member("d0", speed=SPEED))
    assert chosen(policy(), view, LONG) == ALONE
    with pytest.raises(NoWorker, match="no prefill worker is live"):
        chosen(LeastLoad(), view, LONG)


def test_workers_that_measured_nothing_hand_over():
    assert chosen(policy(), one_pair(speed=None), SHORT) == PAIR


def test_a_single_token_needs_no_decode_worker():
    assert chosen(policy(), one_pair(), Need(100, 1)) == ("p0", None)

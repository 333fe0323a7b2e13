"""Continuous batching: who enters when, what a step holds, and that everybody gets through."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.messages import FinishReason, Sampling
from engine.commitment import Commitments
from engine.pacing import Pacing
from engine.pages import Owner, OwnerKind, PageLedger
from engine.policies import FirstCome, ShortestFirst
from engine.prefix_cache import PrefixCache
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from tests.unit.engine.committing import commit

PAGE = 4
STOP = 7


def sequence(key, prompt, max_tokens=1, output=(), computed=0):
    sampling = Sampling(max_tokens=max_tokens, seed=0, stop_token_ids=[STOP])
    return Sequence(key, [1] * prompt, list(output), sampling, computed)


def scheduler(pages=100, max_running=8, chunk_tokens=16, policy=None, prefix_cache=False):
    ledger = PageLedger(pages)
    prefixes = PrefixCache(ledger, PAGE, enabled=prefix_cache)
    pacing, commitments = Pacing(chunk_tokens), Commitments(1.0)
    return Scheduler(ledger, prefixes, PAGE, max_running, policy or FirstCome(), pacing, commitments), ledger


def step(scheduler, token=1):
    """One step that samples `token` for everyone: {key: (start, stop)}, and who finished."""
    plan = scheduler.plan()
    chunks = {chunk.sequence.key: (chunk.start, chunk.stop) for chunk in plan.chunks}
    keys = [sequence.key for sequence in plan.sampling]
    reasons = commit(scheduler, plan, [token] * len(keys))
    return chunks, {key: reason for key, reason in zip(keys, reasons, strict=True) if reason}


def test_a_long_prompt_takes_several_steps_and_samples_in_its_last():
    run, _ = scheduler()
    run.submit(sequence("a", 40))
    assert step(run) == ({"a": (0, 16)}, {})
    assert step(run) == ({"a": (16, 32)}, {})
    assert step(run) == ({"a": (32, 40)}, {"a": FinishReason.LENGTH})
    assert run.plan() is None


def test_short_prompts_share_a_chunk_and_the_budget_goes_to_the_oldest_first():
    run, _ = scheduler()
    for key in "abc":
        run.submit(sequence(key, 7))
    assert step(run)[0] == {"a": (0, 7), "b": (0, 7), "c": (0, 2)}
    assert step(run)[0] == {"c": (2, 7)}


def test_tokens_that_the_prefix_cache_has_are_not_said_to_wait():
    run, _ = scheduler(prefix_cache=True)
    run.submit(sequence("a", 16))
    assert run.queued_tokens == 16
    step(run)
    run.submit(sequence("b", 18))
    run.submit(sequence("c", 16))
    assert run.queued_tokens == 2 + PAGE, "c's last token is computed in any case, and with it its page"
    assert step(run)[0] == {"b": (16, 18), "c": (12, 16)}


def test_decoding_never_waits_for_prefill():
    run, _ = scheduler()
    run.submit(sequence("decodes", 2, max_tokens=9))
    step(run)
    run.submit(sequence("long", 60))
    assert [step(run)[0] for _ in range(2)] == [
        {"decodes": (2, 3), "long": (0, 16)},
        {"decodes": (3, 4), "long": (16, 32)},
    ]


def test_short_prompts_overtake_a_step_under_way_by_the_policy():
    run, ledger = scheduler(policy=ShortestFirst(ageing_seconds=10.0))
    run.submit(sequence("long", 40))
    under_way = run.plan()
    for key, prompt in (("short", 9), ("other", 5), ("shortest", 3), ("longer", 41)):
        run.submit(sequence(key, prompt))
    overtaking = run.overtake(under_way, 0.0)
    assert [(chunk.sequence.key, chunk.start, chunk.stop) for chunk in overtaking.chunks] == [
        ("shortest", 0, 3), ("other", 0, 5),
    ]  # fmt: skip
    assert [one.key for one in overtaking.started] == ["shortest", "other"]
    assert commit(run, overtaking, [1, 1]) == [FinishReason.LENGTH] * 2
    assert commit(run, under_way, []) == []
    assert step(run)[0] == {"short": (0, 9), "long": (16, 23)}
    ledger.check()


@pytest.mark.parametrize(
    ("policy", "prompt", "pages"),
    [(FirstCome(), 3, 100), (ShortestFirst(10.0), 17, 100), (ShortestFirst(10.0), 3, 10)],
    ids=["not its turn", "more than a step", "no pages"],
)
def test_who_does_not_overtake_waits(policy, prompt, pages):
    run, ledger = scheduler(pages=pages, policy=policy)
    run.submit(sequence("long", 40))
    under_way = run.plan()
    run.submit(sequence("waits", prompt))
    assert run.overtake(under_way, 0.0) is None
    commit(run, under_way, [])
    assert run.queued == 1
    ledger.check()


def test_who_has_waited_for_long_is_not_overtaken():
    run, _ = scheduler(policy=ShortestFirst(ageing_seconds=10.0))
    run.submit(sequence("long", 40))
    under_way = run.plan(20.0)
    short = sequence("short", 3)
    short.arrived = 19.0
    run.submit(short)
    assert run.overtake(under_way, 20.0) is None


def test_who_does_not_fit_waits_and_nobody_overtakes():
    run, ledger = scheduler(pages=5)
    run.submit(sequence("a", 12, max_tokens=5))  # 16 tokens: 4 pages
    run.submit(sequence("b", 8))  # 2 pages
    run.submit(sequence("c", 1))  # would fit
    assert set(step(run)[0]) == {"a"}
    assert (run.running, run.queued, run.queued_tokens) == (1, 2, 9)
    assert step(run, STOP)[1] == {"a": FinishReason.STOP}
    assert run.plan() is None
    ledger.release(Owner(OwnerKind.SEQUENCE, "a"))
    assert set(step(run)[0]) == {"b", "c"}


def test_handed_over_kv_enters_past_those_that_wait_for_pages():
    run, ledger = scheduler(pages=6)
    owner = Owner(OwnerKind.SEQUENCE, "handed over")
    pages = ledger.allocate(owner, 3)
    run.submit(sequence("too big for now", 16))
    run.submit(sequence("handed over", 8, max_tokens=4, output=[1], computed=8))
    plan = run.plan()
    assert [(chunk.start, chunk.stop, chunk.prefills, chunk.samples) for chunk in plan.chunks] == [(8, 9, False, True)]
    assert plan.chunks[0].sequence.pages == pages
    assert [one.key for one in plan.started] == ["handed over"]
    assert ledger.used == 3


def test_a_resumed_sequence_computes_its_earlier_output_and_counts_it():
    run, _ = scheduler()
    run.submit(sequence("a", 5, max_tokens=4, output=[1, 2]))
    plan = run.plan()
    assert (plan.chunks[0].stop, plan.chunks[0].prefills) == (7, True)
    assert commit(run, plan, [1]) == [None]
    assert step(run)[1] == {"a": FinishReason.LENGTH}


def test_a_one_token_prompt_is_prefilled():
    run, _ = scheduler()
    run.submit(sequence("a", 1, max_tokens=2))
    plan = run.plan()
    assert (plan.chunks[0].prefills, [one.key for one in plan.started]) == (True, ["a"])
    commit(run, plan, [1])
    assert not run.plan().chunks[0].prefills


def test_cancel_works_wherever_the_sequence_is_and_keeps_its_pages():
    run, ledger = scheduler(pages=4)
    run.submit(sequence("running", 16))
    run.submit(sequence("waiting", 16))
    step(run)
    run.submit(sequence("never planned", 1))
    assert [run.cancel(key) for key in ("running", "waiting", "never planned", "running")] == [False, True, True, False]
    assert (run.queued, run.queued_tokens, run.running, ledger.used) == (0, 0, 0, 4)
    run, ledger = scheduler()
    run.submit(sequence("running", 30))
    step(run)
    assert run.cancel("running")
    assert run.plan() is None
    assert ledger.used == 8


@pytest.mark.parametrize(
    "impossible",
    [
        sequence("no tokens", 0),
        sequence("nothing left to sample", 3, max_tokens=2, output=[1, 1]),
        sequence("more than the pool", 40, max_tokens=2),
        sequence("KV without pages", 8, max_tokens=2, output=[1], computed=8),
        sequence("nothing to feed", 8, max_tokens=2, computed=8),
    ],
    ids=lambda sequence: sequence.key,
)
def test_what_can_never_run_is_refused(impossible):
    run, ledger = scheduler(pages=10)
    with pytest.raises(ValueError, match="can't run"):
        run.submit(impossible)
    assert run.plan() is None
    assert ledger.used == 0


def test_a_key_is_submitted_once():
    run, _ = scheduler()
    run.submit(sequence("a", 30))
    with pytest.raises(ValueError, match="twice"):
        run.submit(sequence("a", 3))
    step(run)
    with pytest.raises(ValueError, match="twice"):
        run.submit(sequence("a", 3))


requests = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 6), st.booleans()), min_size=1, max_size=20
)


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(14, 40), st.integers(1, 6), st.integers(1, 24))
def test_everybody_gets_through_within_the_limits(requests, pages, max_running, chunk_tokens):
    run, ledger = scheduler(pages, max_running, chunk_tokens)
    arrivals = {key: request[2] for key, request in enumerate(requests)}
    unfinished, started, steps = set(arrivals), [], 0
    while unfinished:
        for key, (prompt, max_tokens, when, cancelled) in enumerate(requests):
            if when == steps:
                run.submit(sequence(key, prompt, max_tokens))
            if cancelled and when + 2 == steps and run.cancel(key):
                ledger.release(Owner(OwnerKind.SEQUENCE, key))
                unfinished.discard(key)
        steps += 1
        assert steps < 2000
        plan = run.plan()
        if plan is None:
            assert all(when >= steps for key, when in arrivals.items() if key in unfinished)
            continue
        assert len(plan.chunks) <= run.running <= max_running
        assert sum(chunk.stop - chunk.start for chunk in plan.chunks if chunk.stop - chunk.start > 1) <= chunk_tokens
        for chunk in plan.chunks:
            assert chunk.start == chunk.sequence.computed < chunk.stop <= len(chunk.sequence.pages) * PAGE
        # Every sequence that has been prefilled decodes in each step.
        decoding = {sequence.key for sequence in run._running.values() if sequence.pending == 1}
        assert decoding <= {chunk.sequence.key for chunk in plan.chunks}
        started += plan.started
        sampling = [sequence.key for sequence in plan.sampling]
        for key, reason in zip(sampling, commit(run, plan, [1] * len(sampling)), strict=True):
            if reason is not None:
                ledger.release(Owner(OwnerKind.SEQUENCE, key))
                unfinished.remove(key)
        ledger.check()
    assert len(started) == len(set(started))
    ledger.check()
    assert (ledger.used, run.queued, run.queued_tokens, run.running) == (0, 0, 0, 0)

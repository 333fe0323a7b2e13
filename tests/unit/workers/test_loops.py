"""Prefill and decode loops together: handoffs, cancels, who goes first. What breaks: see test_loop_faults.py."""

from __future__ import annotations

import msgspec
import pytest

from cluster.config import SchedulingPolicy
from cluster.engine_messages import FromPeer, FromRouter, RouterGone
from cluster.errors import from_info
from cluster.messages import (
    Ack,
    AttemptFailed,
    AttemptFinished,
    CancelAttempt,
    DecodeAttempt,
    Done,
    Fence,
    FinishReason,
    PrefillAttempt,
    Role,
    Sampling,
)
from tests.unit.workers.pair import (
    DECODE_EPOCH,
    GREEDY,
    PREFILL_EPOCH,
    ROUTER,
    WITH_STAGES,
    Pair,
    prompt,
    tiny_engine,
)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 100])
@WITH_STAGES
def test_a_handed_over_request_gives_the_tokens_of_a_unified_one(pair, length):
    split = pair.request("split", prompt(length), GREEDY)
    unified = pair.request("unified", prompt(length), GREEDY, legs="decode")
    pair.settle()
    assert len(pair.tokens(split)) == 6
    assert pair.tokens(split) == pair.tokens(unified)
    assert pair.ends(split)[Role.PREFILL].reason is FinishReason.HANDED_OFF
    assert pair.ends(split)[Role.DECODE].reason is FinishReason.LENGTH
    pair.assert_nothing_left()


def test_the_record_tells_chunks_pages_and_steps(pair):
    fence = pair.request("r", prompt(33), GREEDY)
    pair.settle()
    ends = pair.ends(fence)
    prefill, handoff, decode = ends[Role.PREFILL].prefill, ends[Role.PREFILL].handoff, ends[Role.DECODE].decode
    assert (prefill.tokens, prefill.chunks) == (33, 3)
    assert (handoff.pages, handoff.skipped_pages, handoff.batches) == (9, 0, 3)
    assert handoff.bytes == 9 * pair.engines["prefill"].page_bytes
    assert 0 < handoff.tail_seconds <= handoff.exposed_seconds
    assert (decode.steps, decode.batch_sum, decode.batch_max) == (5, 5, 1)
    assert 0 < decode.verify_seconds < handoff.exposed_seconds
    assert decode.first_step_seconds < decode.decode_seconds and decode.lease_seconds == 0


def test_waiting_for_the_step_under_way_is_queueing(pair):
    """The control process had the attempts while the engine computed: its word counts, not when the engine looked."""
    for legs in ("prefill decode", "decode"):
        fence = pair.request(legs, prompt(9), GREEDY, legs=legs, received_at=pair.clock.now() - 5.0)
        pair.settle()
        ends = pair.ends(fence)
        prefill = ends[Role.PREFILL].prefill if Role.PREFILL in ends else ends[Role.DECODE].decode.prefill
        assert 5.0 <= prefill.queue_seconds < 6.0
        assert ends[Role.DECODE].decode.await_seconds > 5.0


def test_a_lease_that_waits_for_pages_is_told_as_such(tmp_path):
    pair = Pair(tiny_engine(tmp_path / "m"), tiny_engine(tmp_path / "m", pool_pages=12))
    first, second = (pair.request(name, prompt(40, seed), GREEDY) for seed, name in enumerate(("first", "second")))
    pair.settle()
    waits = [pair.ends(fence)[Role.DECODE].decode.lease_seconds for fence in (first, second)]
    assert waits[0] == 0.0 and waits[1] >= pair.ends(first)[Role.DECODE].decode.decode_seconds


def test_a_second_turn_computes_and_sends_only_what_is_new(tmp_path):
    pair = Pair(tiny_engine(tmp_path / "m"), tiny_engine(tmp_path / "m"))
    first = pair.request("first", prompt(33), GREEDY)
    pair.settle()
    turn = [*prompt(33), *pair.tokens(first), *prompt(10, seed=9)]
    second = pair.request("second", turn, GREEDY)
    unified = pair.request("unified", turn, GREEDY, legs="decode")
    pair.settle()
    ends = pair.ends(second)
    assert len(turn) == 49
    assert ends[Role.PREFILL].prefill.cached_tokens == 32, "prefill knows the first prompt's full pages"
    handoff = ends[Role.PREFILL].handoff
    assert (handoff.pages, handoff.skipped_pages) == (4, 9), "decode knows the answer, too: 9 of 13 pages are there"
    assert pair.tokens(second) == pair.tokens(unified)
    pair.assert_nothing_left()


def test_the_same_prompt_again_sends_its_last_page_only_or_nothing(tmp_path):
    pair = Pair(tiny_engine(tmp_path / "m"), tiny_engine(tmp_path / "m"))
    for length, pages in ((33, 1), (32, 0)):
        before = pair.request(f"before-{length}", prompt(length), GREEDY)
        pair.settle()
        again = pair.request(f"again-{length}", prompt(length), GREEDY)
        pair.settle()
        assert pair.ends(again)[Role.PREFILL].handoff.pages == pages
        assert pair.tokens(again) == pair.tokens(before)
    pair.assert_nothing_left()


def test_a_handoff_goes_on_between_the_layers_of_a_step(pair):
    """The grant that arrives while the first chunk is computed is acted upon at its end, not one chunk later."""

    def decode_goes_on() -> None:
        while pair.to_decode:
            pair.decode.handle(pair.to_decode.popleft(), pair.clock.now())
        pair.decode.step(pair.clock.now())

    pair.between_layers = decode_goes_on
    fence = pair.request("r", prompt(40), GREEDY)
    while pair.to_prefill:
        pair.prefill.handle(pair.to_prefill.popleft(), pair.clock.now())
    pair.prefill.step(pair.clock.now())
    pair.ports["prefill"].run()
    assert pair.fabric.posted == 1
    pair.settle()
    assert len(pair.tokens(fence)) == 6
    pair.assert_nothing_left()


def test_kv_that_arrives_in_the_middle_of_decodes_step_is_answered_in_it(pair):
    """Else its sequence would miss the next step: the digests are computed while that step runs already."""
    running = pair.request("running", prompt(5), Sampling(max_tokens=200, seed=1, temperature=0.0))
    for _ in range(8):
        pair.turn()
    late = pair.request("late", prompt(16, seed=3), GREEDY)
    for _ in range(50):
        pair.turn_of("prefill")
        if any(isinstance(message, FromPeer) and isinstance(message.message, Done) for message in pair.to_decode):
            break
        pair.turn_of("decode")
    pair.between_decodes_layers = pair.ports["decode"].run
    pair.decode.step(pair.clock.now())
    assert [type(message.message) for message in pair.to_prefill] == [Ack]
    before = len(pair.tokens(running))
    assert before > 1
    # Ahead, a step's tokens come with the next one's.
    steps = 1 + pair.engines["decode"].under_way
    for _ in range(steps):
        pair.decode.step(pair.clock.now())
    assert (len(pair.tokens(running)), len(pair.tokens(late))) == (before + steps, 2), "both in the very next step"
    pair.settle()
    assert len(pair.tokens(late)) == 6
    pair.assert_nothing_left()


@pytest.mark.parametrize("layer", range(8))
def test_decode_may_give_up_in_the_middle_of_prefills_step(pair, layer):
    fence = pair.request("r", prompt(40), GREEDY)
    passed = 0

    def give_up() -> None:
        nonlocal passed
        if passed == layer:
            pair.to_decode.append(FromRouter(ROUTER, CancelAttempt(fence, "the client left")))
        passed += 1
        while pair.to_decode:
            pair.decode.handle(pair.to_decode.popleft(), pair.clock.now())
        pair.decode.step(pair.clock.now())
        for port in pair.ports.values():
            port.run()

    pair.between_layers = give_up
    pair.settle()
    pair.cancel(fence)
    pair.settle()
    assert set(pair.ends(fence)) == {Role.PREFILL, Role.DECODE}
    pair.assert_nothing_left()


@pytest.mark.parametrize("policy", [SchedulingPolicy.SHORTEST_FIRST, SchedulingPolicy.FIRST_COME])
def test_a_shorter_prompt_overtakes_a_step_under_way(tmp_path, policy):
    pair = Pair(tiny_engine(tmp_path / "m", policy=policy), tiny_engine(tmp_path / "m"))
    first = pair.request("long", prompt(60), GREEDY)
    fences = []

    def arrive():
        """A short prompt in the middle of the long one's first step, and one for whose step there is no time."""
        pair.between_layers = lambda: None
        fences.append(pair.request("short", prompt(9, 1), GREEDY))
        pair.cancel(fences[0])
        fences.append(pair.request("cancelled", prompt(30, 2), GREEDY))
        pair.cancel(fences[1])
        fences.append(pair.request("next", prompt(5, 3), GREEDY))

    pair.settle(20)
    pair.between_layers = arrive
    again = pair.request("again", prompt(60, 4), GREEDY)
    pair.turn()
    overtakes = policy is SchedulingPolicy.SHORTEST_FIRST
    assert any(hasattr(word, "offset") for word in pair.router[fences[0]]) is overtakes
    pair.settle()
    expected = [pair.request(f"{fence}", prompt(length, seed), GREEDY, legs="decode") for fence, length, seed in
                ((first, 60, 0), (again, 60, 4), (fences[2], 5, 3))]  # fmt: skip
    pair.settle()
    for fence, alone in zip((first, again, fences[2]), expected, strict=True):
        assert pair.tokens(fence) == pair.tokens(alone)
    assert pair.tokens(fences[1]) == [], "its cancel came before its turn"
    pair.assert_nothing_left()


def test_an_attempt_behind_the_news_that_its_router_was_gone_lives(tmp_path):
    """It came over the router's next connection: the news is of those before it."""
    pair = Pair(tiny_engine(tmp_path / "m", policy=SchedulingPolicy.SHORTEST_FIRST), tiny_engine(tmp_path / "m"))
    fences = [pair.request("long", prompt(60), GREEDY, legs="prefill")]

    def reconnect():
        pair.between_layers = lambda: None
        pair.to_prefill.append(RouterGone(ROUTER))
        fences.append(
            pair.request("short", prompt(9, 1), msgspec.structs.replace(GREEDY, max_tokens=1), legs="prefill")
        )

    pair.between_layers = reconnect
    pair.settle()
    assert pair.ends(fences[0])[Role.PREFILL].reason is FinishReason.CANCELLED
    assert pair.ends(fences[1])[Role.PREFILL].reason is FinishReason.LENGTH
    pair.assert_nothing_left()


@WITH_STAGES
def test_seeded_sampling_is_the_same_split_and_unified_alone_and_in_a_batch(pair):
    sampling = Sampling(max_tokens=12, seed=77, temperature=1.5, top_p=0.95)
    alone = pair.request("alone", prompt(9), sampling)
    pair.settle()
    batch = [pair.request(f"split-{i}", prompt(9, seed=0 if i == 5 else i), sampling) for i in range(10)]
    unified = pair.request("unified", prompt(9), sampling, legs="decode")
    pair.settle()
    assert pair.tokens(alone) == pair.tokens(batch[5]) == pair.tokens(unified)
    assert pair.tokens(batch[4]) != pair.tokens(batch[5])


def test_a_one_token_request_needs_no_decode_leg(pair):
    one = Sampling(max_tokens=1, seed=1, temperature=0.0)
    fence = pair.request("one", prompt(20), one, legs="prefill")
    pair.settle()
    assert len(pair.tokens(fence)) == 1
    assert pair.ends(fence)[Role.PREFILL].reason is FinishReason.LENGTH
    pair.assert_nothing_left()


@WITH_STAGES
def test_a_first_token_that_ends_the_request_frees_both_sides(pair):
    reference = pair.request("reference", prompt(20), GREEDY)
    pair.settle()
    stop = Sampling(max_tokens=6, seed=1, temperature=0.0, stop_token_ids=pair.tokens(reference)[:1])
    fence = pair.request("stop", prompt(20), stop)
    pair.settle()
    assert pair.tokens(fence) == pair.tokens(reference)[:1]
    assert pair.ends(fence)[Role.PREFILL].reason is FinishReason.STOP
    assert pair.ends(fence)[Role.DECODE].reason is FinishReason.CANCELLED
    pair.assert_nothing_left()


@pytest.mark.parametrize("legs", ["prefill decode", "decode", "prefill"])
@WITH_STAGES
def test_a_cancel_at_any_moment_gives_everything_back_with_one_last_word_per_leg(pair, legs):
    for moment in range(24):
        fence = pair.request(f"r{moment}", prompt(40, seed=moment), GREEDY, legs=legs)
        for _ in range(moment):
            pair.turn()
        pair.cancel(fence)
        pair.settle()
        assert set(pair.ends(fence)) == {Role(leg) for leg in legs.split()}
        pair.assert_nothing_left()


@pytest.mark.parametrize("moment", range(0, 16, 2))
@WITH_STAGES
def test_a_router_that_is_gone_cancels_its_attempts_alone(pair, moment):
    mine = pair.request("mine", prompt(40), GREEDY)
    other = Fence("other", 1, PREFILL_EPOCH, DECODE_EPOCH)
    pair.to_prefill.append(FromRouter("second", PrefillAttempt(other, prompt(40), GREEDY, "decode")))
    pair.to_decode.append(FromRouter("second", DecodeAttempt(other, prompt(40), GREEDY, "prefill")))
    for _ in range(moment):
        pair.turn()
    for wire in (pair.to_prefill, pair.to_decode):
        wire.append(RouterGone(ROUTER))
    pair.settle()
    assert len(pair.tokens(other)) == 6
    assert set(pair.ends(mine)) == {Role.PREFILL, Role.DECODE}
    pair.assert_nothing_left()


def test_a_decode_leg_that_loses_its_router_alone_fails_the_prefill_leg_so_that_another_attempt_may_help(pair):
    fence = pair.request("half", prompt(40), GREEDY)
    for _ in range(3):
        pair.turn()
    pair.to_decode.append(RouterGone(ROUTER))
    pair.settle()
    failed = pair.ends(fence)[Role.PREFILL]
    assert isinstance(failed, AttemptFailed)
    assert failed.blame is Role.DECODE
    error = from_info(failed.error)
    assert error.retryable and not error.fault, "nobody has done wrong"
    pair.assert_nothing_left()


def test_an_offer_that_comes_before_its_attempt_waits_for_it(pair):
    fence = Fence("early", 1, PREFILL_EPOCH, DECODE_EPOCH)
    pair.to_prefill.append(FromRouter(ROUTER, PrefillAttempt(fence, prompt(20), GREEDY, "decode")))
    pair.settle()
    assert pair.engines["decode"].ledger.used == 0
    pair.to_decode.append(FromRouter(ROUTER, DecodeAttempt(fence, prompt(20), GREEDY, "prefill")))
    pair.settle()
    assert len(pair.tokens(fence)) == 6
    pair.assert_nothing_left()


def test_an_offer_whose_attempt_never_comes_is_refused_in_bounded_time(pair):
    fence = Fence("orphan", 1, PREFILL_EPOCH, DECODE_EPOCH)
    pair.to_prefill.append(FromRouter(ROUTER, PrefillAttempt(fence, prompt(20), GREEDY, "decode")))
    pair.settle()
    pair.clock.advance(11.0)
    pair.settle()
    failed = pair.ends(fence)[Role.PREFILL]
    assert isinstance(failed, AttemptFailed)
    assert failed.blame is Role.DECODE
    pair.assert_nothing_left()


def test_a_late_offer_for_a_cancelled_attempt_is_refused_at_once(pair):
    fence = Fence("late", 1, PREFILL_EPOCH, DECODE_EPOCH)
    pair.to_decode.append(FromRouter(ROUTER, DecodeAttempt(fence, prompt(20), GREEDY, "prefill")))
    pair.settle()
    pair.cancel(fence)
    pair.settle()
    pair.to_prefill.append(FromRouter(ROUTER, PrefillAttempt(fence, prompt(20), GREEDY, "decode")))
    pair.settle()
    assert isinstance(pair.ends(fence)[Role.PREFILL], AttemptFailed)
    pair.assert_nothing_left()


def test_decode_leases_pages_in_the_order_of_offers_when_the_pool_is_short(tmp_path):
    pair = Pair(tiny_engine(tmp_path / "m"), tiny_engine(tmp_path / "m", pool_pages=12))
    fences = [pair.request(f"r{i}", prompt(20 + i), GREEDY) for i in range(8)]
    pair.settle()
    assert all(len(pair.tokens(fence)) == 6 for fence in fences)
    ends = [message.fence for said in pair.router.values() for message in said if isinstance(message, AttemptFinished)]
    assert len(ends) == 16
    pair.assert_nothing_left()


def test_what_can_never_fit_is_refused_with_the_numbers(pair):
    fence = pair.request("long", prompt(100), Sampling(max_tokens=200, seed=1), legs="decode")
    pair.settle()
    failed = pair.ends(fence)[Role.DECODE]
    assert isinstance(failed, AttemptFailed)
    assert failed.error.code == "PromptTooLong"
    assert "256" in failed.error.message


@pytest.mark.parametrize("legs", ["prefill", "decode"])
def test_an_attempt_for_another_life_of_the_worker_is_refused_and_counted(pair, legs):
    stale = Fence("stale", 1, PREFILL_EPOCH - 1, DECODE_EPOCH - 1)
    if legs == "prefill":
        pair.to_prefill.append(FromRouter(ROUTER, PrefillAttempt(stale, prompt(5), GREEDY, None)))
    else:
        pair.to_decode.append(FromRouter(ROUTER, DecodeAttempt(stale, prompt(5), GREEDY, None)))
    pair.settle()
    assert pair.ends(stale)[Role(legs)].error.code == "StaleFence"
    assert getattr(pair, legs).load().stale_messages == 1


def test_a_repeated_attempt_is_counted_and_changes_nothing(pair):
    fence = pair.request("twice", prompt(20), GREEDY)
    pair.request("twice", prompt(20), GREEDY)
    pair.settle()
    assert len(pair.tokens(fence)) == 6
    assert set(pair.ends(fence)) == {Role.PREFILL, Role.DECODE}


@pytest.mark.parametrize("end", ["finished", "cancelled"])
def test_an_attempt_that_comes_again_after_its_end_is_refused_and_does_not_wait(pair, end):
    fence = pair.request("late", prompt(20), GREEDY)
    if end == "cancelled":
        pair.cancel(fence)
    pair.settle()
    said = len(pair.router[fence])
    pair.to_decode.append(FromRouter(ROUTER, DecodeAttempt(fence, prompt(20), GREEDY, "prefill")))
    pair.settle()
    (refused,) = pair.router[fence][said:]
    assert refused.error.code == "StaleFence"
    assert not from_info(refused.error).fault, "nobody has done wrong"
    assert (pair.decode.load().queued, pair.decode.load().stale_messages) == (0, 1)
    pair.assert_nothing_left()


def test_closing_ends_the_transfer_thread(pair):
    pair.prefill.close()
    pair.decode.close()
    assert pair.closed == ["prefill", "decode"]

"""Prefill and decode loops together: handoffs, cancels at every moment, lost peers, pages that always come back."""

from __future__ import annotations

import random

import msgspec
import pytest

from cluster.config import SchedulingPolicy
from cluster.engine_messages import FromPeer, FromRouter, PeerDown, RouterGone
from cluster.errors import QuarantineFull, from_info
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
from tests.unit.workers.pair import DECODE_EPOCH, PREFILL_EPOCH, QUARANTINE_SECONDS, ROUTER, Pair, tiny_engine

GREEDY = Sampling(max_tokens=6, seed=1, temperature=0.0)


@pytest.fixture(params=[True, False], ids=["prefix-cache", "no-cache"])
def pair(tmp_path, request):
    engines = [tiny_engine(tmp_path / "m", prefix_cache=request.param) for _ in range(2)]
    return Pair(*engines)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(128), k=length)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 100])
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
    pair.decode.step(pair.clock.now())
    assert (len(pair.tokens(running)), len(pair.tokens(late))) == (before + 1, 2), "both in the very next step"
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


def test_damaged_pages_fail_the_request_and_nothing_is_decoded_from_them(pair):
    pair.fabric.corrupt_writes.add(0)
    fence = pair.request("damaged", prompt(40), GREEDY)
    pair.settle()
    failed = pair.ends(fence)[Role.DECODE]
    assert isinstance(failed, AttemptFailed)
    assert failed.error.code == "TransferFailed"
    assert len(pair.tokens(fence)) <= 1, "only the prefill leg's own token"
    pair.assert_nothing_left()


def test_a_first_token_that_no_model_has_is_refused_and_counted_and_harms_nobody_else(pair):
    liar, other = pair.request("liar", prompt(40), GREEDY), pair.request("other", prompt(24), GREEDY)
    honest = pair.decode.handle

    def lied_to(message, now):
        if isinstance(message, FromPeer) and isinstance(message.message, Done) and message.message.fence == liar:
            message = msgspec.structs.replace(
                message, message=msgspec.structs.replace(message.message, first_token=10**6)
            )
        honest(message, now)

    pair.decode.handle = lied_to
    pair.settle()
    assert pair.decode.load().stale_messages >= 1
    assert len(pair.tokens(other)) == GREEDY.max_tokens
    assert len(pair.tokens(liar)) <= 1
    pair.cancel(liar)
    pair.decode.handle = honest
    pair.settle()
    pair.assert_nothing_left()


@pytest.mark.parametrize("moment", range(14))
def test_a_broken_connection_fails_the_request_at_once_and_pages_wait_for_the_writers_word(pair, moment):
    fence = pair.request("cut", prompt(40), GREEDY)
    for _ in range(moment):
        pair.turn()
    pair.disconnect()
    pair.settle()
    pair.clock.advance(6.0)
    pair.settle()
    ends = pair.ends(fence)
    assert Role.PREFILL in ends
    pair.cancel(fence)
    pair.connect()
    pair.settle()
    assert set(pair.ends(fence)) == {Role.PREFILL, Role.DECODE}
    pair.assert_nothing_left()


def test_leased_pages_of_a_dead_writer_come_back_with_proof_of_its_death_only(pair):
    pair.fabric.hold = True
    pair.request("r", prompt(40), GREEDY)
    for _ in range(6):
        pair.turn()
    leased = pair.engines["decode"].ledger.counts()["lease"]
    assert leased == 10
    pair.to_decode.clear()
    pair.decode.handle(PeerDown("prefill", PREFILL_EPOCH), pair.clock.now())
    for _ in range(50):
        pair.clock.advance(60.0)
        pair.decode.step(pair.clock.now())
        pair.ports["decode"].run()
    assert pair.decode.load().pages_quarantined == leased, "an hour of silence proves nothing"
    pair.dead.add(PREFILL_EPOCH)
    for _ in range(60):
        pair.clock.advance(1.0)
        pair.decode.step(pair.clock.now())
        pair.ports["decode"].run()
    assert pair.engines["decode"].pages_used == 0


def crowded(pair: Pair) -> Fence:
    """A request whose writer falls silent in the middle: 10 of decode's 16 pages are in quarantine."""
    pair.fabric.hold = True
    fence = pair.request("silent", prompt(40), GREEDY)
    for _ in range(6):
        pair.turn()
    pair.to_decode.clear()
    pair.decode.handle(PeerDown("prefill", PREFILL_EPOCH), pair.clock.now())
    pair.decode.step(pair.clock.now())
    assert pair.decode.load().pages_quarantined == 10
    return fence


def small_pool(tmp_path) -> Pair:
    return Pair(tiny_engine(tmp_path / "m"), tiny_engine(tmp_path / "m", pool_pages=16))


def test_a_worker_out_of_quarantine_refuses_drains_and_ends(tmp_path):
    pair = small_pool(tmp_path)
    running = pair.request("running", prompt(5), GREEDY, legs="decode")
    crowded(pair)
    pair.clock.advance(QUARANTINE_SECONDS - 1)
    pair.decode.step(pair.clock.now())
    assert pair.decode.load().ready, "the writer may come back yet"
    waiting = pair.request("waiting", prompt(12), GREEDY)
    pair.decode.handle(pair.to_decode.pop(), pair.clock.now())
    pair.clock.advance(2.0)
    pair.decode.step(pair.clock.now())
    assert (pair.decode.load().ready, pair.decode.load().draining) == (False, True)
    late = pair.request("late", prompt(5), GREEDY, legs="decode")
    with pytest.raises(QuarantineFull, match="10 of 16"):
        pair.settle()
    for fence in (waiting, late):
        failed = pair.ends(fence)[Role.DECODE]
        assert (failed.error.code, failed.blame) == ("Draining", Role.DECODE)
        assert from_info(failed.error).retryable
    assert len(pair.tokens(running)) == 6, "what decodes may finish"


def test_a_worker_whose_quarantine_ends_in_time_goes_on(tmp_path):
    pair = small_pool(tmp_path)
    crowded(pair)
    pair.clock.advance(QUARANTINE_SECONDS - 1)
    pair.dead.add(PREFILL_EPOCH)
    for _ in range(60):
        pair.turn_of("decode")
    assert pair.engines["decode"].pages_used == 0
    after = pair.request("after", prompt(5), GREEDY, legs="decode")
    for _ in range(20):
        pair.turn_of("decode")
    assert len(pair.tokens(after)) == 6


def test_random_requests_and_cancels_leave_nothing_behind(pair):
    chance = random.Random(5)
    live: list[Fence] = []
    for number in range(150):
        legs = chance.choice(["prefill decode", "prefill decode", "decode"])
        sampling = Sampling(max_tokens=chance.randint(2, 12), seed=number, temperature=chance.choice([0.0, 1.0]))
        live.append(pair.request(f"r{number}", prompt(chance.randint(1, 60), seed=number), sampling, legs=legs))
        for _ in range(chance.randint(0, 4)):
            pair.turn()
        if chance.random() < 0.3:
            pair.cancel(chance.choice(live))
    pair.settle()
    assert all(pair.ends(fence) for fence in live)
    pair.assert_nothing_left()


def disturb(pair: Pair, chance: random.Random) -> None:
    """What peers have said is lost, repeated or overtaken; or all of it goes, with the connection."""
    for wire in (pair.to_prefill, pair.to_decode):
        said = [message for message in wire if isinstance(message, FromPeer)]
        for message in said:
            fate = chance.random()
            if fate < 0.1:
                wire.remove(message)
            elif fate < 0.2:
                wire.append(message)
            elif fate < 0.3:
                wire.rotate(1)
    if chance.random() < 0.02:
        pair.disconnect()
    if chance.random() < 0.1:
        pair.connect()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_network_does_every_leg_ends_and_what_is_told_is_right(tmp_path, seed):
    pair = Pair(tiny_engine(tmp_path / "m"), tiny_engine(tmp_path / "m", pool_pages=48))
    chance = random.Random(seed)
    prompts: dict[Fence, list[int]] = {}
    for number in range(40):
        text = prompt(chance.randint(1, 60), seed=chance.randint(0, 10))
        prompts[pair.request(f"r{number}", text, GREEDY)] = text
        for _ in range(chance.randint(0, 6)):
            disturb(pair, chance)
            pair.turn()
        if chance.random() < 0.1:
            pair.cancel(chance.choice(list(prompts)))
    pair.connect()
    for _ in range(40):
        pair.turn()
        pair.clock.advance(1.0)
    for fence in prompts:  # as a router does to the leg that is left
        pair.cancel(fence)
    pair.settle()
    assert all(set(pair.ends(fence)) == {Role.PREFILL, Role.DECODE} for fence in prompts)
    pair.assert_nothing_left()

    whole = [fence for fence in prompts if getattr(pair.ends(fence)[Role.DECODE], "reason", "") is FinishReason.LENGTH]
    assert len(whole) > 10, "most get through"
    for fence in whole:
        alone = pair.request(f"again {fence.request}", prompts[fence], GREEDY, legs="decode")
        pair.settle()
        assert pair.tokens(fence) == pair.tokens(alone)


def test_closing_ends_the_transfer_thread(pair):
    pair.prefill.close()
    pair.decode.close()
    assert pair.closed == ["prefill", "decode"]

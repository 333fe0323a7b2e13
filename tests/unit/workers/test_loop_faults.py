"""Prefill and decode loops when something breaks: damage, lost peers, quarantine, wild networks."""

from __future__ import annotations

import random

import msgspec
import pytest

from cluster.engine_messages import FromPeer, PeerDown
from cluster.errors import QuarantineFull, from_info
from cluster.messages import (
    AttemptFailed,
    Done,
    Fence,
    FinishReason,
    Role,
    Sampling,
)
from tests.unit.workers.pair import (
    GREEDY,
    PREFILL_EPOCH,
    QUARANTINE_SECONDS,
    WITH_STAGES,
    Pair,
    prompt,
    tiny_engine,
)


@WITH_STAGES
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


@WITH_STAGES
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

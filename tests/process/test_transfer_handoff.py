"""Whole handoffs between two processes over real engines: chunk by chunk, verified, and when one side dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.config import Network
from cluster.errors import from_info
from cluster.messages import Fence, Role
from kv_transfer.receiver import HandoffFailed, KVArrived, LeaseEnded
from tests.process.conditions import NETWORK, PACE
from tests.process.transfer_pair import DECODE_EPOCH, PREFILL_EPOCH, Pair, ended, fence, of


@pytest.fixture(scope="module", params=["nixl", "mooncake"])
def transfer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pair(transfer: str) -> Iterator[Pair]:
    pair = Pair(transfer)
    pair.connect()
    yield pair
    pair.close()


@pytest.fixture
def own_pair() -> Iterator[Callable[..., Pair]]:
    """For tests that end one of the two."""
    pairs: list[Pair] = []

    def start(transfer: str, environment: dict[str, str] | None = None) -> Pair:
        pairs.append(Pair(transfer, environment))
        pairs[-1].connect()
        return pairs[-1]

    yield start
    for pair in pairs:
        pair.kill()


def test_pages_arrive_chunk_by_chunk_verified_and_in_their_places(pair):
    handoff, sources, targets = fence("chunks"), [3, 9, 4, 11, 2], [40, 8, 63, 0, 17]
    for page in sources:
        pair.sender.call("fill", page, 1)
    pair.grant(handoff, 75, targets)
    for tokens in (20, 48, 75):
        pair.sender.call("computed", handoff, sources, tokens)
        pair.step_sender()
    pair.sender.call("finish", handoff, 42)
    assert pair.until(of(KVArrived, handoff)).first_token == 42
    end = pair.until(ended(handoff))
    assert end.error is None
    assert end.timings.pages == 5
    assert pair.receiver.call("digests", targets) == pair.sender.call("digests", sources)


def test_sixteen_handoffs_at_once_each_get_their_own_pages(pair):
    handoffs = [(fence(f"many{n}"), [2 * n, 2 * n + 1], [63 - 2 * n, 62 - 2 * n]) for n in range(16)]
    for page in range(32):
        pair.sender.call("fill", page, 7)
    for handoff, sources, targets in handoffs:
        pair.grant(handoff, 32, targets)
        pair.sender.call("computed", handoff, sources, 32)
        pair.sender.call("finish", handoff, 1)
    for handoff, sources, targets in handoffs:
        pair.until(of(KVArrived, handoff))
        assert pair.until(ended(handoff)).error is None
        assert pair.receiver.call("digests", targets) == pair.sender.call("digests", sources)


def test_pages_that_decode_has_already_are_not_sent(pair):
    handoff = fence("skip")
    before = pair.receiver.call("digests", [50])
    pair.sender.call("fill", 6, 9)
    pair.grant(handoff, 40, [51], skip=32)
    pair.sender.call("computed", handoff, [4, 5, 6], 40)
    pair.sender.call("finish", handoff, 1)
    pair.until(of(KVArrived, handoff))
    assert pair.until(ended(handoff)).timings.pages == 1
    assert pair.receiver.call("digests", [51]) == pair.sender.call("digests", [6])
    assert pair.receiver.call("digests", [50]) == before


def test_an_idle_transfer_thread_leaves_the_core_alone(pair):
    pair.sender.post("idle_cpu", 2.0)
    assert pair.receiver.call("idle_cpu", 2.0) < 0.1 * PACE
    assert pair.sender.answer() < 0.1 * PACE


def test_a_killed_writer_gives_the_pages_back_because_the_kernel_says_so(own_pair, transfer):
    pair = own_pair(transfer)
    handoff = fence("killed")
    pair.grant(handoff, 32, [1, 2])
    pair.sender.kill()
    began = time.monotonic()
    pair.receiver.call("peer_down", "prefill", PREFILL_EPOCH)
    failed = pair.until(of(HandoffFailed, handoff), pair.step_receiver)
    assert (failed.error.code, failed.blame) == ("WorkerLost", Role.PREFILL)
    pair.until(of(LeaseEnded, handoff), pair.step_receiver)
    assert time.monotonic() - began < 5.0 * PACE


def test_a_killed_receiver_ends_the_sender_and_frees_its_pages(own_pair, transfer):
    pair = own_pair(transfer)
    first, second = fence("first"), fence("second")
    pair.grant(first, 16, [1])
    pair.sender.call("computed", first, [1], 16)
    pair.sender.call("finish", first, 1)
    pair.until(ended(first))
    pair.grant(second, 32, [2, 3])
    pair.receiver.kill()
    began = time.monotonic()
    pair.sender.call("computed", second, [1, 2], 32)
    end = pair.until(ended(second), pair.step_sender)
    assert (end.error.code, end.blame) == ("TransferFailed", Role.DECODE)
    assert time.monotonic() - began < 10.0 * PACE


@pytest.mark.skipif(NETWORK is Network.RDMA, reason="a NIC goes on writing to a process that was stopped")
@pytest.mark.parametrize(
    ("transfer", "environment"),
    [("nixl", {"UCX_TLS": "tcp", "UCX_TCP_USER_TIMEOUT": "2s"}), ("mooncake", {"MC_TRANSFER_TIMEOUT": "5"})],
)
def test_bytes_that_arrive_late_never_reach_a_page_that_was_given_back(own_pair, transfer, environment):
    """The receiver is stopped in the middle of a write, the writer gives up, the receiver goes on."""
    pair = own_pair(transfer, environment)
    warm, handoff = fence("warm"), fence("late")
    pair.grant(warm, 16, [1])
    pair.sender.call("computed", warm, [1], 16)
    pair.sender.call("finish", warm, 1)
    pair.until(ended(warm))

    targets = list(range(2, 60))
    for page in range(58):
        pair.sender.call("fill", page, 5)
    pair.grant(handoff, 58 * 16, targets)
    os.kill(pair.receiver.process.pid, signal.SIGSTOP)
    pair.sender.call("computed", handoff, list(range(58)), 58 * 16)
    end = pair.until(ended(handoff), pair.step_sender)
    assert end.error.code == "TransferFailed"

    os.kill(pair.receiver.process.pid, signal.SIGCONT)
    pair.until(of(LeaseEnded, handoff))
    for page in targets:
        pair.receiver.call("fill", page, 6)
    reused = pair.receiver.call("digests", targets)
    pair.receiver.call("idle_cpu", 0.5)
    assert pair.receiver.call("digests", targets) == reused


def test_damaged_pages_are_never_decoded_from_and_another_attempt_gets_them_whole(pair):
    damaged, again = fence("damaged"), Fence("damaged", 1, PREFILL_EPOCH, DECODE_EPOCH)
    for handoff in (damaged, again):
        pair.sender.call("fill", 12, 3)
        pair.grant(handoff, 16, [30])
        pair.sender.call("computed", handoff, [12], 16)
        pair.sender.call("finish", handoff, 1)
        if handoff is damaged:
            while not pair.to_receiver:  # until DONE is on its way: all is written
                pair.step_sender()
            pair.receiver.call("fill", 30, 4)
            failed = pair.until(of(HandoffFailed, damaged))
            pair.until(of(LeaseEnded, damaged))
            for end in (failed, pair.until(ended(damaged))):
                assert (end.error.code, end.blame) == ("TransferFailed", Role.PREFILL)
                assert from_info(end.error).retryable
    pair.until(of(KVArrived, again))
    assert pair.until(ended(again)).error is None
    assert pair.receiver.call("digests", [30]) == pair.sender.call("digests", [12])

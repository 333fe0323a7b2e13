"""A writer that is paused, killed or stuck in the middle of a write never touches a page that was given back.

Both ends are processes, connected by a real engine over TCP. A write is caught in the middle by stopping its receiver
until the sockets' buffers are full: more of it is always on its way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from cluster.config import Network
from cluster.errors import TransferStuck
from cluster.messages import Abort, Aborted, Fence, Role, decode
from kv_transfer.receiver import LeaseEnded
from tests.process.conditions import NETWORK
from tests.process.transfer_pair import (
    PREFILL_EPOCH,
    SOURCES,
    TARGETS,
    TOKENS_PER_PAGE,
    Pair,
    cancelled_but_kept,
    ended,
    fence,
    hand_over,
    of,
    pause,
    resume,
    reused_pages_stay_untouched,
)

pytestmark = pytest.mark.skipif(
    NETWORK is Network.RDMA, reason="tests/rdma has these for RDMA, which has no such buffers"
)

LAYERS = 48
"""So that 58 pages are 34 MB, several times what all buffers between two processes hold."""
NEVER_BY_THEMSELVES = {
    "nixl": {"UCX_TLS": "tcp", "UCX_TCP_USER_TIMEOUT": "100s"},
    "mooncake": {"MC_TRANSFER_TIMEOUT": "60"},
}
"""Environments in which the engines bear with a silent peer for longer than a test."""


@pytest.fixture
def start() -> Iterator[Callable[..., Pair]]:
    """A connected pair that has handed over a page already, if `warm`."""
    pairs: list[Pair] = []

    def start_pair(transfer: str, *, warm: bool = True, **options: float) -> Pair:
        pair = Pair(transfer, NEVER_BY_THEMSELVES[transfer], layers=LAYERS, **options)
        pairs.append(pair)
        pair.connect()
        if warm:
            hand_over(pair, fence("warm"), [1], [1])
        pair.use_others()
        return pair

    yield start_pair
    for pair in pairs:
        pair.kill()


def caught_in_the_middle(pair: Pair, handoff: Fence) -> list[int]:
    """The receiver is stopped, the sender writes, and will not come to an end. Digests of what it writes."""
    for page in SOURCES:
        pair.sender.call("fill", page, 5)
    written = pair.sender.call("digests", SOURCES)
    pair.grant(handoff, len(SOURCES) * TOKENS_PER_PAGE, TARGETS)
    pause(pair.receiver)
    pair.sender.call("computed", handoff, SOURCES, len(SOURCES) * TOKENS_PER_PAGE)
    deadline = time.monotonic() + 10.0
    while not pair.sender.call("under_way"):
        assert time.monotonic() < deadline, "nothing is written"
    return written


@pytest.mark.parametrize("transfer", ["nixl", "mooncake"])
def test_a_paused_writer_that_wakes_up_late_or_never_touches_no_page_that_was_reused(start, transfer):
    pair = start(transfer)
    late, never = fence("late"), fence("never")

    written = caught_in_the_middle(pair, late)
    pause(pair.sender)
    cancelled_but_kept(pair, late)
    assert pair.receiver.call("digests", TARGETS) != written, "not all of it is here"
    assert Abort in {type(decode(frame)) for frame in pair.to_sender}
    resume(pair.sender)
    assert pair.until(ended(late), pair.step_sender).error.code == "Cancelled"
    assert Aborted in {type(decode(frame)) for frame in pair.to_receiver}
    pair.until(of(LeaseEnded, late))
    assert pair.receiver.call("digests", TARGETS) == written, (
        "it did write late, and into pages that were still its own"
    )
    reused_pages_stay_untouched(pair)

    caught_in_the_middle(pair, never)
    pause(pair.sender)
    cancelled_but_kept(pair, never)
    pair.sender.kill()
    pair.receiver.call("peer_down", "prefill", PREFILL_EPOCH)
    pair.until(of(LeaseEnded, never), pair.step_receiver)
    reused_pages_stay_untouched(pair)


def test_a_write_that_never_ends_takes_nixls_agent_with_it_and_the_next_one_works(start):
    pair = start("nixl", write_timeout=1.5)
    stuck, after = fence("stuck"), fence("after")
    caught_in_the_middle(pair, stuck)
    end = pair.until(ended(stuck), pair.step_sender)
    assert end.error.code == "TransferFailed"
    resume(pair.receiver)
    pair.until(of(LeaseEnded, stuck))
    reused_pages_stay_untouched(pair)
    hand_over(pair, after, SOURCES, TARGETS)


def test_a_peer_that_is_stopped_before_mooncake_has_met_it_costs_its_own_write_and_nothing_else(start):
    """Mooncake asks it for its memory, and would wait for a minute."""
    pair = start("mooncake", warm=False, write_timeout=1.5)
    first, after = fence("first"), fence("after")
    caught_in_the_middle(pair, first)
    began = time.monotonic()
    end = pair.until(ended(first), pair.step_sender)
    assert (end.error.code, end.blame) == ("TransferFailed", Role.DECODE)
    assert time.monotonic() - began < 10.0
    resume(pair.receiver)
    pair.until(of(LeaseEnded, first))
    reused_pages_stay_untouched(pair)
    hand_over(pair, after, SOURCES, TARGETS)


def test_a_write_that_never_ends_takes_mooncakes_process_with_it(start):
    pair = start("mooncake", write_timeout=1.5)
    stuck = fence("stuck")
    caught_in_the_middle(pair, stuck)
    with pytest.raises(TransferStuck, match=r"for 1\.5 s"):
        pair.until(ended(stuck), pair.step_sender)
    pair.sender.kill()  # what its worker does with an engine process that says so
    resume(pair.receiver)
    pair.receiver.call("peer_down", "prefill", PREFILL_EPOCH)
    pair.until(of(LeaseEnded, stuck), pair.step_receiver)
    reused_pages_stay_untouched(pair)

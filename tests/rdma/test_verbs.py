"""Both transfer engines over real RDMA verbs: the bytes take that way, and a writer's death is where they end.

Run by `make test-rdma` in an emulated machine, whose only card for verbs is soft-RoCE's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.config import TransferName
from cluster.messages import Abort, Aborted, Done, Fence, decode
from kv_transfer.backends import backend_environment
from kv_transfer.receiver import KVArrived, LeaseEnded
from tests.process.transfer_ends import BackendEnd, Remote
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
from tests.rdma.guest import DEVICE

pytestmark = pytest.mark.rdma

CARD = Path("/sys/class/infiniband", DEVICE, "ports/1/hw_counters")
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")
LARGEST_PACKET = 4096
"""Of payload, by the InfiniBand architecture."""
PAGES, PAGE_BYTES = 16, 262_144
LAYERS = 96
"""So that 58 pages are 68 MB, which take the emulated card a second or more."""
SECONDS = 300.0
TOKENS = len(SOURCES) * TOKENS_PER_PAGE


def sent_packets() -> int:
    return int((CARD / "sent_pkts").read_text())


def loopback_bytes() -> int:
    return int(LOOPBACK.read_text())


@pytest.fixture(params=["nixl", "mooncake"])
def transfer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def start(transfer: str) -> Iterator[Callable[..., Pair]]:
    """A connected pair with large pages that has handed over one already."""
    pairs: list[Pair] = []

    def start_pair(environment: dict[str, str] | None = None, **options: float) -> Pair:
        pair = Pair(transfer, environment, layers=LAYERS, **options)
        pairs.append(pair)
        pair.connect()
        hand_over(pair, fence("warm"), [1], [1])
        pair.use_others()
        return pair

    yield start_pair
    for pair in pairs:
        pair.kill()


def test_the_bytes_go_through_the_card_and_not_through_tcp(transfer):
    sender, receiver = (Remote.start(BackendEnd, transfer, name, PAGES, PAGE_BYTES) for name in ("sender", "receiver"))
    sender.call("connect", "peer", receiver.call("descriptor"))
    assert sender.call("wait", sender.call("write", "peer", [0], [0]), SECONDS) == "done"
    for page in range(PAGES):
        sender.call("fill", page, 3)
    packets, loopback = sent_packets(), loopback_bytes()
    pages = list(range(PAGES))
    assert sender.call("wait", sender.call("write", "peer", pages, pages[::-1]), SECONDS) == "done"
    assert receiver.call("digests", pages[::-1]) == sender.call("digests", pages)
    assert sent_packets() - packets >= PAGES * PAGE_BYTES / LARGEST_PACKET
    assert loopback_bytes() - loopback < PAGE_BYTES
    sender.close()
    receiver.close()


@pytest.mark.parametrize(("network", "devices"), [("rdma", DEVICE), ("tcp", "")])
def test_an_engine_opens_the_card_if_it_is_asked_to_and_leaves_it_alone_if_not(transfer, network, devices):
    """By kv.network alone: what else `make test-rdma` tells UCX is taken out."""
    code = f"""
import sys
sys.modules["torch"] = None  # as in the ends
from cluster.config import KV, Network, TransferName
from kv_transfer.backends import open_backend
from kv_transfer.backends.verbs import opened_devices
from tests.process.transfer_ends import SharedPool
pool, kv = SharedPool(4, 65536), KV(transfer=TransferName({transfer!r}), network=Network({network!r}))
backend = open_backend(kv, "agent", pool.memory, "127.0.0.1")
print(*opened_devices())
backend.close()
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | backend_environment(TransferName(transfer)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, devices), done.stderr


def test_a_write_needs_nothing_of_the_process_that_it_goes_to(start):
    """Its receiver is stopped meanwhile; for less time than UCX leaves between two questions whether it lives."""
    pair, handoff = start(), fence("one-sided")
    written = prepared(pair, handoff)
    pause(pair.receiver)
    pair.sender.call("computed", handoff, SOURCES, TOKENS)
    pair.sender.call("finish", handoff, 1)
    wait_until(lambda: bool(sent_by(pair) & {Done, Aborted}))
    assert Aborted not in kinds(pair.to_receiver), "the write failed"
    resume(pair.receiver)
    pair.until(of(KVArrived, handoff))
    assert pair.until(ended(handoff)).error is None
    assert pair.receiver.call("digests", TARGETS) == written


@pytest.mark.parametrize("transfer", ["nixl"])
def test_a_stopped_process_that_is_asked_whether_it_lives_costs_the_write_and_no_page(start):
    """UCX asks now and then, its peers' software answers, and the end of a write waits for what it has asked before."""
    pair = start({"UCX_KEEPALIVE_INTERVAL": "1s"}, write_timeout=30.0)
    asked, after = fence("asked"), fence("after")
    prepared(pair, asked)
    pause(pair.receiver)
    pair.sender.call("computed", asked, SOURCES, TOKENS)
    assert pair.until(ended(asked), pair.step_sender).error.code == "TransferFailed"
    resume(pair.receiver)
    pair.until(of(LeaseEnded, asked))
    reused_pages_stay_untouched(pair)
    hand_over(pair, after, SOURCES[:4], TARGETS[:4])


def test_a_writer_that_is_killed_in_the_middle_writes_no_more_and_its_pages_come_back(start):
    pair, handoff = start(), fence("killed")
    written = caught_in_the_middle(pair, handoff)
    pair.sender.kill()
    assert pair.receiver.call("digests", TARGETS) != written, "it was in the middle"
    pair.receiver.call("peer_down", "prefill", PREFILL_EPOCH)
    pair.until(of(LeaseEnded, handoff), pair.step_receiver)
    reused_pages_stay_untouched(pair)


def test_a_paused_writers_pages_are_kept_until_it_has_written_its_last_or_is_dead(start):
    pair, late, never = start(), fence("late"), fence("never")

    written = caught_in_the_middle(pair, late)
    pause(pair.sender)
    cancelled_but_kept(pair, late)
    assert pair.receiver.call("digests", TARGETS) != written, "it was in the middle"
    assert Abort in kinds(pair.to_sender)
    resume(pair.sender)
    assert pair.until(ended(late), pair.step_sender).error.code == "Cancelled"
    assert Aborted in kinds(pair.to_receiver)
    pair.until(of(LeaseEnded, late))
    assert pair.receiver.call("digests", TARGETS) == written, "it did write late, while they were still its own"
    reused_pages_stay_untouched(pair)

    caught_in_the_middle(pair, never)
    pause(pair.sender)
    cancelled_but_kept(pair, never)
    pair.sender.kill()
    pair.receiver.call("peer_down", "prefill", PREFILL_EPOCH)
    pair.until(of(LeaseEnded, never), pair.step_receiver)
    reused_pages_stay_untouched(pair)


def prepared(pair: Pair, handoff: Fence) -> list[int]:
    """All is granted and nothing written. Digests of what will be written, other than what is there."""
    for page in SOURCES:
        pair.sender.call("fill", page, 5)
    for page in TARGETS:
        pair.receiver.call("fill", page, 4)
    pair.grant(handoff, TOKENS, TARGETS)
    return pair.sender.call("digests", SOURCES)


def caught_in_the_middle(pair: Pair, handoff: Fence) -> list[int]:
    """The first of the pages is there. Digests of what is written."""
    written = prepared(pair, handoff)
    pair.sender.call("computed", handoff, SOURCES, TOKENS)
    wait_until(lambda: pair.receiver.call("digests", TARGETS[:1]) == written[:1])
    return written


def kinds(frames: list[bytes]) -> set[type]:
    return {type(decode(frame)) for frame in frames}


def sent_by(pair: Pair) -> set[type]:
    """The kinds of messages that the sender has sent and nobody has read, after another of its steps."""
    pair.step_sender()
    return kinds(pair.to_receiver)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"

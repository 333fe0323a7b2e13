"""What every transfer engine must do, real or fake; the real ones between two processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec
import pytest

from cluster.config import Network
from cluster.errors import AvailabilityError, PeerUnreachable, ProtocolError
from kv_transfer.backends.base import PoolDescriptor
from kv_transfer.backends.memory import MemoryBackend, MemoryFabric
from tests.process.conditions import NETWORK, PACE
from tests.process.transfer_ends import BackendEnd, Remote, SharedPool

PAGES, PAGE_BYTES = 32, 20_000
"""A page size that is no multiple of the system's."""
SECONDS = 20.0 * PACE
ENGINES = ["nixl", "mooncake"] if NETWORK is Network.RDMA else ["memory", "nixl", "nixl-tcp", "mooncake"]


class End(Protocol):
    def call(self, method: str, *arguments: Any) -> Any: ...
    def kill(self) -> None: ...
    def close(self) -> None: ...


class MemoryEnd(BackendEnd):
    """The fake's end: lives in this process, dies by leaving the fabric."""

    def __init__(self, fabric: MemoryFabric, agent: str) -> None:
        self.pool = SharedPool(PAGES, PAGE_BYTES)
        self.backend = MemoryBackend(fabric, agent, self.pool.memory)
        self._writes = []

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self, method)(*arguments)

    def kill(self) -> None:
        self.backend.close()


@pytest.fixture(params=ENGINES, scope="module")
def start(request: pytest.FixtureRequest) -> Iterator[Callable[[str], End]]:
    """Starts an end of the engine under test."""
    ends: list[End] = []
    fabric = MemoryFabric()

    def start_end(agent: str) -> End:
        name, _, only = request.param.partition("-")
        if name == "memory":
            ends.append(MemoryEnd(fabric, f"{agent}{len(ends)}"))
        else:
            environment = {"UCX_TLS": only} if only else None
            ends.append(Remote.start(BackendEnd, name, agent, PAGES, PAGE_BYTES, environment=environment))
        return ends[-1]

    yield start_end
    for end in ends:
        end.close()


@pytest.fixture(scope="module")
def ends(start: Callable[[str], End]) -> tuple[End, End]:
    """A sender and a receiver that the tests share: starting an engine takes longer than a test."""
    return start("sender"), start("receiver")


@pytest.fixture
def pair(ends: tuple[End, End]) -> Iterator[tuple[End, End]]:
    """The sender is connected to the receiver, as `peer`."""
    sender, receiver = ends
    sender.call("connect", "peer", receiver.call("descriptor"))
    yield ends
    sender.call("disconnect", "peer")


def test_scattered_pages_arrive_byte_exact_and_nothing_else_changes(pair):
    sender, receiver = pair
    for page in range(PAGES):
        sender.call("fill", page, 1)
        receiver.call("fill", page, 2)
    before = receiver.call("digests", list(range(PAGES)))
    sources, targets = [0, 5, 6, 31, 2], [31, 0, 9, 8, 17]
    assert sender.call("wait", sender.call("write", "peer", sources, targets), SECONDS) == "done"
    after = receiver.call("digests", list(range(PAGES)))
    expected = dict(zip(targets, sender.call("digests", sources), strict=True))
    assert after == [expected.get(page, before[page]) for page in range(PAGES)]


def test_writes_under_way_together_all_arrive_and_terminal_states_stay(pair):
    sender, receiver = pair
    for page in range(PAGES):
        sender.call("fill", page, 3)
    writes = [sender.call("write", "peer", [page, page + 1], [page + 1, page]) for page in range(0, PAGES, 2)]
    assert {sender.call("wait", write, SECONDS) for write in writes} == {"done"}
    assert {sender.call("poll", write) for write in writes} == {"done"}
    digests = sender.call("digests", list(range(PAGES)))
    swapped = [digests[page ^ 1] for page in range(PAGES)]
    assert receiver.call("digests", list(range(PAGES))) == swapped


def test_page_numbers_outside_a_pool_are_refused_before_a_byte_moves(pair):
    sender, receiver = pair
    before = receiver.call("digests", [0])
    with pytest.raises(ProtocolError, match="32"):
        sender.call("write", "peer", [0, 1], [0, PAGES])
    with pytest.raises(ValueError, match="32"):
        sender.call("write", "peer", [0, PAGES], [0, 1])
    with pytest.raises(PeerUnreachable):
        sender.call("write", "stranger", [0], [0])
    assert receiver.call("digests", [0]) == before


def test_a_pool_of_another_kind_is_refused(pair):
    sender, receiver = pair
    with pytest.raises(ProtocolError):
        sender.call("connect", "other", b"not a descriptor")
    with pytest.raises(ProtocolError, match="pages of"):
        sender.call(
            "connect",
            "other",
            receiver.call("descriptor").replace((20_000).to_bytes(2, "big"), (20_001).to_bytes(2, "big")),
        )


def test_an_endpoint_that_is_none_harms_nobody(pair):
    sender, receiver = pair
    good = msgspec.msgpack.decode(receiver.call("descriptor"), type=PoolDescriptor)
    for endpoint in (b"", b"garbage"):
        bad = msgspec.structs.replace(good, endpoint=endpoint).encode()
        try:
            sender.call("connect", "nobody", bad)
        except (PeerUnreachable, ProtocolError):
            continue
        assert outcome_of(sender, "nobody") == "failed"
    assert outcome_of(sender, "peer") == "done"


def test_a_killed_receiver_fails_the_write_soon_and_its_successor_is_reached(start, ends):
    (sender, successor), victim = ends, start("receiver")
    sender.call("connect", "peer", victim.call("descriptor"))
    assert sender.call("wait", sender.call("write", "peer", [0], [0]), SECONDS) == "done"

    victim.kill()
    began = time.monotonic()
    assert outcome_of(sender, "peer") == "failed"
    assert time.monotonic() - began < 10.0 * PACE

    sender.call("disconnect", "peer")
    sender.call("disconnect", "peer")
    sender.call("connect", "peer", successor.call("descriptor"))
    sender.call("fill", 2, 4)
    assert sender.call("wait", sender.call("write", "peer", [2], [3]), SECONDS) == "done"
    assert successor.call("digests", [3]) == sender.call("digests", [2])
    sender.call("disconnect", "peer")


def test_a_dead_peer_does_not_disturb_a_living_one(start, pair):
    (sender, living), victim = pair, start("receiver")
    sender.call("connect", "victim", victim.call("descriptor"))
    victim.kill()
    sender.call("fill", 5, 5)
    write = sender.call("write", "peer", [5], [6])
    assert outcome_of(sender, "victim") == "failed"
    assert sender.call("wait", write, SECONDS) == "done"
    assert living.call("digests", [6]) == sender.call("digests", [5])
    sender.call("disconnect", "victim")


def outcome_of(sender: End, peer: str) -> str:
    """Of a write to that peer; it may also be refused outright."""
    try:
        return sender.call("wait", sender.call("write", peer, [1], [1]), SECONDS)
    except AvailabilityError:
        return "failed"


def test_a_peer_can_be_connected_again(pair):
    sender, receiver = pair
    for seed in (6, 7, 8):
        sender.call("connect", "peer", receiver.call("descriptor"))
        sender.call("fill", 1, seed)
        assert sender.call("wait", sender.call("write", "peer", [1], [1]), SECONDS) == "done"
        assert receiver.call("digests", [1]) == sender.call("digests", [1])
        sender.call("disconnect", "peer")


def test_the_end_of_a_connection_holds_up_nobody(pair):
    """An engine that locks the interpreter while it ends would stop all that its process computes."""
    sender, _ = pair
    assert sender.call("wait", sender.call("write", "peer", [0], [0]), SECONDS) == "done"
    sender.call("disconnect", "peer")
    asked = began = time.monotonic()
    while asked < began + 0.5:
        sender.call("poll", 0)
        answered = time.monotonic()
        assert answered - asked < 0.3 * PACE
        asked = answered


def test_an_engine_that_is_restarted_knows_nobody_and_can_meet_them_again(pair):
    sender, receiver = pair
    done = sender.call("write", "peer", [4], [4])
    assert sender.call("wait", done, SECONDS) == "done"
    sender.call("restart")
    assert sender.call("poll", done) == "done", "what has ended has ended"
    with pytest.raises(PeerUnreachable):
        sender.call("write", "peer", [4], [4])
    sender.call("connect", "peer", receiver.call("descriptor"))
    sender.call("fill", 4, 9)
    assert sender.call("wait", sender.call("write", "peer", [4], [5]), SECONDS) == "done"
    assert receiver.call("digests", [5]) == sender.call("digests", [4])

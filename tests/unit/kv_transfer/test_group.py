"""Handoffs between workers that are divided differently: real sender and receiver, a transfer engine for each rank."""

from __future__ import annotations

import ctypes
from collections import deque

import msgspec
import pytest

from cluster.clock import ManualClock
from cluster.errors import ErrorInfo
from cluster.layout import KVLayout
from cluster.messages import Abort, Aborted, Ack, DeathAsked, EngineRank, PeerHello, ProcessIdentity, Role
from cluster.shards import Grid, key_value_heads, layers_of
from kv_transfer.backends.memory import MemoryBackend, MemoryFabric
from kv_transfer.digests import PageDigests
from kv_transfer.driver import TransferDriver
from kv_transfer.receiver import HandoffFailed, HandoffReceiver, KVArrived, LeaseEnded, OfferArrived
from kv_transfer.sender import HandoffSender
from tests.unit.kv_transfer.world import DECODE_EPOCH, PREFILL_EPOCH, FollowerPort, InlinePort, Pool, fence

LAYOUT = KVLayout(model="test", dtype="float16", page_size=4, layers=2, kv_heads=3, head_dim=2)
GRIDS = [*map(Grid, range(1, 6)), Grid(1, 2), Grid(2, 2), Grid(3, 2), Grid(4, 2)]
PAGES = 12
SOURCES, TARGETS = (1, 2, 3), (7, 5, 9)
TOKENS = 10


class Worker:
    """One side's ranks."""

    def __init__(self, role: Role, epoch: int, grid: Grid, fabric: MemoryFabric, clock: ManualClock) -> None:
        self.layout = msgspec.structs.replace(LAYOUT, shards=grid.shards, stages=grid.stages)
        ranks = grid.ranks
        self.pools = [Pool(PAGES, self.layout.of_rank(rank).page_bytes) for rank in range(ranks)]
        backends = [MemoryBackend(fabric, f"{role.value}-{rank}", pool.memory) for rank, pool in enumerate(self.pools)]
        drivers = [
            TransferDriver(backend, PageDigests(pool.memory), clock)
            for backend, pool in zip(backends, self.pools, strict=True)
        ]
        self.first = InlinePort(drivers[0])
        self.followers = [FollowerPort(InlinePort(driver), self.first) for driver in drivers[1:]]
        self.processes = [ProcessIdentity("boot", "pid", epoch + rank, 1) for rank in range(ranks)]
        known = [EngineRank(backend.descriptor, one) for backend, one in zip(backends, self.processes, strict=True)]
        self.hello = PeerHello(
            role.value, role, epoch, self.layout, "memory", known[0].descriptor, known[0].process, followers=known[1:]
        )

    def kv(self, page: int, rank: int) -> bytes:
        """What a rank has in a page, or should have: its heads, its layers of each."""
        grid = self.layout.grid
        heads = key_value_heads(LAYOUT.kv_heads, grid.shards, grid.shard_of(rank))
        layers = layers_of(LAYOUT.layers, grid.stages, grid.stage_of(rank))
        return b"".join(kv(page, head, layer) for head in heads for layer in layers)

    def fill(self, page: int) -> None:
        """KV of all heads and layers, each in each rank that has it."""
        for rank, pool in enumerate(self.pools):
            content = self.kv(page, rank)
            ctypes.memmove(pool.memory.page_address(page), content, len(content))

    def run(self) -> None:
        for port in (self.first, *self.followers):
            port.run()


def kv(page: int, head: int, layer: int) -> bytes:
    """What a layer of a head has in a page of the prefill worker."""
    return bytes((16 * page + 5 * head + 97 * layer + at) % 251 for at in range(LAYOUT.head_bytes // LAYOUT.layers))


class World:
    def __init__(self, sources: Grid, targets: Grid) -> None:
        self.clock = ManualClock(1000.0)
        self.fabric = MemoryFabric()
        self.prefill = Worker(Role.PREFILL, PREFILL_EPOCH, sources, self.fabric, self.clock)
        self.decode = Worker(Role.DECODE, DECODE_EPOCH, targets, self.fabric, self.clock)
        self.dead: set[ProcessIdentity] = set()
        self.to_decode: deque = deque()
        self.to_prefill: deque = deque()
        self.sender = HandoffSender(
            self.prefill.first,
            self.prefill.layout,
            lambda worker, epoch, message: self.to_decode.append(message),
            self.clock,
            True,
            epoch=PREFILL_EPOCH,
            followers=self.prefill.followers,
        )
        self.receiver = HandoffReceiver(
            self.decode.first,
            self.decode.layout,
            lambda worker, epoch, message: self.to_prefill.append(message),
            self.clock,
            True,
            epoch=DECODE_EPOCH,
            is_dead=self.dead.__contains__,
            followers=self.decode.followers,
        )
        self.sender.peer_up(self.decode.hello)
        self.receiver.peer_up(self.prefill.hello)

    def offer_and_compute(self) -> None:
        """All is computed and granted, nothing is written yet."""
        for page in SOURCES:
            self.prefill.fill(page)
        self.sender.offer(fence(), "decode", TOKENS)
        self.deliver()
        assert self.poll() == [OfferArrived(fence(), TOKENS)]
        self.receiver.grant(fence(), TARGETS)
        self.deliver()
        self.sender.computed(fence(), list(SOURCES), TOKENS)
        self.sender.finish(fence(), 42)

    def deliver(self) -> list:
        said = []
        while self.to_decode or self.to_prefill:
            for wire, end, worker, epoch in (
                (self.to_decode, self.receiver, "prefill", PREFILL_EPOCH),
                (self.to_prefill, self.sender, "decode", DECODE_EPOCH),
            ):
                while wire:
                    said.append(wire.popleft())
                    end.receive(worker, epoch, said[-1])
        return said

    def work(self) -> list:
        """All ranks' engines, then both shells, twice; what was said."""
        said = []
        for _ in range(2):
            self.prefill.run()
            self.decode.run()
            self.sender.advance(self.clock.now())
            self.receiver.advance()
            said += self.deliver()
        return said

    def poll(self) -> list:
        return self.receiver.poll(self.clock.now())

    def arrived(self) -> bool:
        return all(
            pool.read(target) == self.decode.kv(source, rank)
            for rank, pool in enumerate(self.decode.pools)
            for source, target in zip(SOURCES, TARGETS, strict=True)
        )


@pytest.mark.parametrize("targets", GRIDS)
@pytest.mark.parametrize("sources", GRIDS)
def test_each_rank_has_its_heads_and_layers_when_the_kv_has_arrived(sources, targets):
    world = World(sources, targets)
    world.offer_and_compute()
    world.work()
    (arrived,) = world.poll()
    assert isinstance(arrived, KVArrived) and arrived.first_token == 42
    assert world.arrived()
    (ended,) = world.sender.poll(world.clock.now())
    assert ended.error is None and ended.timings.bytes == len(SOURCES) * LAYOUT.page_bytes


@pytest.mark.parametrize(
    ("sources", "targets"),
    [(Grid(2), Grid(3)), (Grid(3), Grid(2)), (Grid(2), Grid()), (Grid(1, 2), Grid(3)), (Grid(2, 2), Grid(3, 1))],
)
def test_damage_of_any_rank_is_noticed(sources, targets):
    parts = World(sources, targets)
    parts.offer_and_compute()
    parts.work()
    for number in range(parts.fabric.posted):
        world = World(sources, targets)
        world.fabric.corrupt_writes.add(number)
        world.offer_and_compute()
        said = world.work()
        assert not any(isinstance(message, Ack) for message in said)
        assert [type(event) for event in world.poll()] == [HandoffFailed, LeaseEnded]


def test_a_rank_that_still_writes_keeps_the_pages_until_its_last_byte():
    """The others' writes have failed, or are over: ABORTED waits for the last one."""
    world = World(Grid(1, 2), Grid(3))
    world.fabric.hold = True
    world.offer_and_compute()
    world.work()
    first, *others = world.fabric.held
    world.fabric.held = others
    world.fabric.carry(first, corrupt=False)
    world.receiver.cancel(fence(), ErrorInfo("Cancelled", "the client has left"))
    said = world.deliver() + world.work()
    assert any(isinstance(message, Abort) for message in said)
    assert not any(isinstance(message, Aborted) for message in said)
    assert world.poll() == [] and world.sender.poll(world.clock.now()) == []
    world.fabric.release()
    assert any(isinstance(message, Aborted) for message in world.work())
    world.clock.advance(1.0)
    for _ in range(60):
        world.decode.run()
    assert world.poll() == [LeaseEnded(fence())]


def test_pages_come_back_when_all_ranks_of_the_writer_are_dead_and_not_before():
    world = World(Grid(2), Grid())
    world.fabric.hold = True
    world.offer_and_compute()
    world.prefill.run()
    world.receiver.peer_down("prefill", PREFILL_EPOCH)
    assert [type(event) for event in world.poll()] == [HandoffFailed]
    for process in world.prefill.processes:
        assert world.receiver.quarantined == [fence()]
        world.dead.add(process)
        world.clock.advance(1.0)
        world.poll()
    for _ in range(60):
        world.decode.run()
        world.clock.advance(0.1)
    assert world.poll() == [LeaseEnded(fence())]
    assert not any(isinstance(message, DeathAsked) for message in world.to_prefill)

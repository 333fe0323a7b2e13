"""Whatever happens in whatever order, a page never has two writers, and everything ends.

A random walk over two workers: messages delayed, repeated, reordered, lost alone or with their connection, or heard
again from an earlier life; connections that one side alone sees break; writes held, failed, damaged, landing late or
never ending; cancels on both sides; processes killed and replaced, some out of sight of the other's kernel. The decode
worker here reuses pages at the first chance, lowest number first, so that a page that came back too early is written
twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from random import Random

import hypothesis.strategies as st
from hypothesis import given, settings

from cluster.errors import ErrorInfo
from cluster.messages import DeathAsked, DeathWitnessed, Fence, PeerMessage
from kv_transfer.backends.base import WriteState
from kv_transfer.receiver import HandoffFailed, KVArrived, OfferArrived
from tests.unit.kv_transfer.world import LAYOUT, World, fence

CANCELLED = ErrorInfo("DeadlineExceeded", "cancelled")
POOL = 10


class Prefill:
    """What the prefill worker does with its pages."""

    def __init__(self) -> None:
        self.free = list(range(POOL))
        self.pages: dict[Fence, list[int]] = {}
        self.tokens: dict[Fence, int] = {}
        self.computed: dict[Fence, int] = {}


class Walk:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.world = World(pages=POOL)
        self.world.fabric.hold = True
        self.prefill = Prefill()
        self.offers: dict[Fence, int] = {}
        self.free = list(range(POOL))
        self.leased: dict[Fence, list[int]] = {}
        self.content: dict[Fence, int] = {}

        self.connected = False
        self.count = 0
        self.ghosts: list[tuple[str, int, PeerMessage]] = []
        """What was on a wire when it broke: (to whom, the speaker's epoch, message)."""

    # --- prefill -----------------------------------------------------------------------------------------------------

    def offer(self) -> None:
        tokens = self.random.randint(1, 12)
        pages = LAYOUT.pages_for(tokens)
        if len(self.prefill.free) < pages:
            return
        self.count += 1
        handoff = fence(f"r{self.count}", prefill=self.world.prefill_epoch, decode=self.world.decode_epoch)
        taken, self.prefill.free = self.prefill.free[:pages], self.prefill.free[pages:]
        for page in taken:
            self.world.source.fill(page, self.count % 251 + 1)
        self.content[handoff] = self.count % 251 + 1
        self.prefill.pages[handoff], self.prefill.tokens[handoff] = taken, tokens
        self.prefill.computed[handoff] = 0
        self.world.sender.offer(handoff, "decode", tokens)

    def compute(self) -> None:
        handoff = self._any(self.prefill.computed)
        if handoff is None:
            return
        total = self.prefill.tokens[handoff]
        tokens = self.random.randint(self.prefill.computed[handoff], total)
        self.prefill.computed[handoff] = tokens
        self.world.sender.computed(handoff, self.prefill.pages[handoff], tokens)
        if tokens == total:
            self.world.sender.finish(handoff, 7)
            del self.prefill.computed[handoff]

    def cancel_prefill(self) -> None:
        handoff = self._any(self.prefill.pages)
        if handoff is None:
            return
        self.prefill.computed.pop(handoff, None)
        self.world.sender.cancel(handoff, CANCELLED)

    def step_prefill(self) -> None:
        for ended in self.world.poll_sender():
            pages = self.prefill.pages.pop(ended.fence)
            self.prefill.computed.pop(ended.fence, None)
            self.prefill.free += pages
            for page in pages:
                self.world.source.fill(page, 0xEE)

    def kill_prefill(self) -> None:
        """Its process is gone, with all its writes; the successor has a new epoch."""
        world = self.world
        self.random.choice([world.dead, world.dead_elsewhere]).add(world.prefill_epoch)
        world.fabric.held.clear()
        self._clear_wires()
        if self.connected and self.random.random() < 0.5:
            world.receiver.peer_down("prefill", world.prefill_epoch)
        world.prefill_epoch += 1
        world.start_prefill()
        self.prefill = Prefill()
        self.connected = False

    # --- decode ------------------------------------------------------------------------------------------------------

    def grant(self) -> None:
        handoff = self._any(self.offers)
        if handoff is None:
            return
        tokens = self.offers[handoff]
        skipped = 1 if tokens > LAYOUT.page_size and self.random.random() < 0.3 else 0
        pages = LAYOUT.pages_for(tokens) - skipped
        if len(self.free) < pages:
            return
        del self.offers[handoff]
        self.free.sort()
        self.leased[handoff], self.free = self.free[:pages], self.free[pages:]
        self.world.receiver.grant(handoff, self.leased[handoff], skipped * LAYOUT.page_size)

    def refuse(self) -> None:
        handoff = self._any(self.offers)
        if handoff is None:
            return
        del self.offers[handoff]
        self.world.receiver.refuse(handoff, ErrorInfo("Draining", "leaving"))

    def cancel_decode(self) -> None:
        handoff = self._any(self.leased)
        if handoff is not None:
            self.world.receiver.cancel(handoff, CANCELLED)

    def step_decode_slowly(self) -> None:
        self.step_decode(settle=True)

    def step_decode(self, settle: bool = False) -> None:
        world = self.world
        if settle:
            world.decode_port.run()
            world.clock.advance(0.3)
            world.fabric.land_late()  # what our own kernel holds lands while the engine is driven
            world.decode_port.run(turns=60)
        for event in world.poll_receiver():
            if isinstance(event, OfferArrived):
                assert event.fence not in self.leased
                self.offers[event.fence] = event.tokens
            elif isinstance(event, HandoffFailed):
                self.offers.pop(event.fence, None)
            else:
                pages = self.leased.pop(event.fence)
                if isinstance(event, KVArrived):
                    expected = bytes([self.content[event.fence]]) * LAYOUT.page_bytes
                    assert all(world.target.read(page) == expected for page in pages), "decoding from foreign KV"
                self.free += pages

    def kill_decode(self) -> None:
        """Its process is gone, with its pages; the successor has a new epoch."""
        world = self.world
        self._clear_wires()
        if self.connected and self.random.random() < 0.5:
            world.sender.peer_down("decode", world.decode_epoch)
        world.decode_epoch += 1
        world.start_decode()
        self.offers, self.leased, self.free = {}, {}, list(range(POOL))
        self.connected = False

    # --- the network --------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Also without a break that anybody has noticed."""
        self.world.connect()
        self.connected = True

    def disconnect(self) -> None:
        if not self.connected:
            return
        self.world.disconnect()
        self.connected = False

    def half_break(self) -> None:
        """One side alone notices."""
        world = self.world
        if not self.connected:
            return
        self._clear_wires()
        if self.random.random() < 0.5:
            world.sender.peer_down("decode", world.decode_epoch)
        else:
            world.receiver.peer_down("prefill", world.prefill_epoch)

    def lose(self) -> None:
        """One message, and nothing else."""
        wire = self.random.choice([self.world.to_decode, self.world.to_prefill])
        if wire:
            wire.remove(self.random.choice(wire))

    def haunt(self) -> None:
        """A word that was thought lost, in its speaker's name or its successor's. Of another life, it is refused."""
        if not self.ghosts:
            return
        world = self.world
        to, epoch, message = self.random.choice(self.ghosts)
        if to == "decode":
            end, worker, present = world.receiver, "prefill", world.prefill_epoch
        else:
            end, worker, present = world.sender, "decode", world.decode_epoch
        epoch = self.random.choice([epoch, present])
        lives = (epoch, world.decode_epoch) if to == "decode" else (world.prefill_epoch, epoch)
        fits = lives == (message.fence.prefill_epoch, message.fence.decode_epoch)
        welcome = fits and end._peers.connected(worker, epoch)
        before = sum(end.stale.values())
        end.receive(worker, epoch, message)
        assert welcome or sum(end.stale.values()) == before + 1

    def _clear_wires(self) -> None:
        world = self.world
        for to, epoch, wire in (
            ("decode", world.prefill_epoch, world.to_decode),
            ("prefill", world.decode_epoch, world.to_prefill),
        ):
            said = [message for message in wire if not isinstance(message, DeathAsked | DeathWitnessed)]
            self.ghosts += [(to, epoch, message) for message in said]
        world.to_decode.clear()
        world.to_prefill.clear()

    def wait(self) -> None:
        """Some seconds in which nothing happens, but for what time brings about."""
        for _ in range(self.random.choice([1, 2, 5, 20])):
            self.world.clock.advance(1.0)
            self.world.prefill_port.run()

    def deliver_to_decode(self) -> None:
        if self.world.to_decode:
            self._mix(self.world.to_decode)
            self.world.deliver_to_decode()

    def deliver_to_prefill(self) -> None:
        if self.world.to_prefill:
            self._mix(self.world.to_prefill)
            self.world.deliver_to_prefill()

    def _mix(self, wire: deque[PeerMessage]) -> None:
        if self.random.random() < 0.1:
            wire.append(wire[0])
        if self.random.random() < 0.1:
            wire.rotate(1)

    def end_a_write(self) -> None:
        fabric = self.world.fabric
        if not fabric.held:
            return
        write = fabric.held.pop(self.random.randrange(len(fabric.held)))
        fate = self.random.random()
        if fate < 0.1:
            write.state = WriteState.FAILED
            fabric.lost.append(write)
        else:
            fabric.carry(write, corrupt=fate < 0.2)

    # --- what must hold -----------------------------------------------------------------------------------------------

    def no_page_under_way_is_free(self) -> None:
        free = {self.world.target.memory.page_address(page) for page in self.free}
        for write in [*self.world.fabric.held, *self.world.fabric.lost]:
            assert not free & {target for _, target in write.moves}, "a page was given back under its writer's hands"

    def every_page_has_one_owner(self) -> None:
        owned = self.free + [page for pages in self.leased.values() for page in pages]
        assert sorted(owned) == list(range(POOL))

    def end(self) -> None:
        """The network heals, the dead are dead, and everybody goes on, or gives up: everything must end by itself, and
        every page come home."""
        world = self.world
        world.fabric.hold = False
        world.connect()
        if self.random.random() < 0.5:
            self._clear_wires()  # no connection will be made again: what was lost is to be missed by somebody
        giving_up = self.random.random() < 0.5
        for _ in range(40):
            world.fabric.release()
            if giving_up:
                self._give_up()
            else:
                self._go_on()
            self.step_prefill()
            world.deliver()
            self.step_decode(settle=True)
            world.clock.advance(1.0)
        assert world.sender.active == world.receiver.active == 0
        assert world.receiver.quarantined == []
        assert sorted(self.free) == sorted(self.prefill.free) == list(range(POOL))

    def _give_up(self) -> None:
        for handoff in list(self.prefill.pages):
            self.prefill.computed.pop(handoff, None)
            self.world.sender.cancel(handoff, CANCELLED)
        while self.offers:
            self.refuse()

    def _go_on(self) -> None:
        for handoff in list(self.prefill.computed):
            del self.prefill.computed[handoff]
            tokens = self.prefill.tokens[handoff]
            self.world.sender.computed(handoff, self.prefill.pages[handoff], tokens)
            self.world.sender.finish(handoff, 7)
        for _ in range(len(self.offers)):
            self.grant()

    def _any(self, handoffs: Iterable[Fence]) -> Fence | None:
        found = list(handoffs)
        return self.random.choice(found) if found else None


WEIGHTS = {
    Walk.offer: 6,
    Walk.compute: 10,
    Walk.step_prefill: 10,
    Walk.end_a_write: 8,
    Walk.grant: 8,
    Walk.step_decode: 6,
    Walk.step_decode_slowly: 6,
    Walk.deliver_to_decode: 12,
    Walk.deliver_to_prefill: 12,
    Walk.connect: 8,
    Walk.disconnect: 1,
    Walk.cancel_prefill: 1,
    Walk.cancel_decode: 1,
    Walk.refuse: 1,
    Walk.kill_prefill: 1,
    Walk.kill_decode: 1,
    Walk.half_break: 1,
    Walk.lose: 2,
    Walk.haunt: 2,
    Walk.wait: 3,
}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_a_page_never_has_two_writers_and_everything_ends(seed: int) -> None:
    random = Random(seed)
    walk = Walk(random)
    walk.connect()
    for step in random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=300):
        step(walk)
        walk.no_page_under_way_is_free()
        walk.every_page_has_one_owner()
    walk.end()

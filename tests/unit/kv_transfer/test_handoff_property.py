"""Whatever happens in whatever order, a page never has two writers, and everything ends.

A random walk over two workers: messages delayed, repeated, reordered and lost with their connection; writes held,
failed, damaged, or landing late; cancels on both sides; prefill processes killed and replaced. The decode worker here
reuses pages at the first chance, lowest number first, so that a page that came back too early is written twice.
"""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.errors import ErrorInfo
from cluster.messages import Fence
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


class Handoffs(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(pages=POOL)
        self.world.fabric.hold = True
        self.prefill = Prefill()
        self.offers: dict[Fence, int] = {}
        self.free = list(range(POOL))
        self.leased: dict[Fence, list[int]] = {}
        self.content: dict[Fence, int] = {}

        self.connected = False
        self.count = 0

    # --- prefill -----------------------------------------------------------------------------------------------------

    @rule(tokens=st.integers(1, 12))
    def offer(self, tokens: int) -> None:
        pages = LAYOUT.pages_for(tokens)
        if len(self.prefill.free) < pages:
            return
        self.count += 1
        handoff = fence(f"r{self.count}", prefill=self.world.prefill_epoch)
        taken, self.prefill.free = self.prefill.free[:pages], self.prefill.free[pages:]
        for page in taken:
            self.world.source.fill(page, self.count % 251 + 1)
        self.content[handoff] = self.count % 251 + 1
        self.prefill.pages[handoff], self.prefill.tokens[handoff] = taken, tokens
        self.prefill.computed[handoff] = 0
        self.world.sender.offer(handoff, "decode", tokens)

    @precondition(lambda self: self.prefill.computed)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        handoff = data.draw(st.sampled_from(list(self.prefill.computed)))
        total = self.prefill.tokens[handoff]
        tokens = data.draw(st.integers(self.prefill.computed[handoff], total))
        self.prefill.computed[handoff] = tokens
        self.world.sender.computed(handoff, self.prefill.pages[handoff], tokens)
        if tokens == total:
            self.world.sender.finish(handoff, 7)
            del self.prefill.computed[handoff]

    @precondition(lambda self: self.prefill.pages)
    @rule(data=st.data())
    def cancel_prefill(self, data: st.DataObject) -> None:
        handoff = data.draw(st.sampled_from(list(self.prefill.pages)))
        self.prefill.computed.pop(handoff, None)
        self.world.sender.cancel(handoff, CANCELLED)

    @rule()
    def step_prefill(self) -> None:
        for ended in self.world.poll_sender():
            pages = self.prefill.pages.pop(ended.fence)
            self.prefill.computed.pop(ended.fence, None)
            self.prefill.free += pages
            for page in pages:
                self.world.source.fill(page, 0xEE)

    @rule(die_quietly=st.booleans())
    def kill_prefill(self, die_quietly: bool) -> None:
        """Its process is gone, with all its writes; the successor has a new epoch."""
        world = self.world
        world.dead.add(world.prefill_epoch)
        world.fabric.held.clear()
        world.to_decode.clear()
        world.to_prefill.clear()
        if not die_quietly:
            world.receiver.peer_down("prefill", world.prefill_epoch)
        world.prefill_epoch += 1
        world.start_prefill()
        self.prefill = Prefill()
        self.connected = False

    # --- decode ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.offers)
    @rule(data=st.data(), skip=st.booleans())
    def grant(self, data: st.DataObject, skip: bool) -> None:
        handoff = data.draw(st.sampled_from(list(self.offers)))
        tokens = self.offers[handoff]
        skipped = 1 if skip and tokens > LAYOUT.page_size else 0
        pages = LAYOUT.pages_for(tokens) - skipped
        if len(self.free) < pages:
            return
        del self.offers[handoff]
        self.free.sort()
        self.leased[handoff], self.free = self.free[:pages], self.free[pages:]
        self.world.receiver.grant(handoff, self.leased[handoff], skipped * LAYOUT.page_size)

    @precondition(lambda self: self.offers)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        handoff = data.draw(st.sampled_from(list(self.offers)))
        del self.offers[handoff]
        self.world.receiver.refuse(handoff, ErrorInfo("Draining", "leaving"))

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def cancel_decode(self, data: st.DataObject) -> None:
        self.world.receiver.cancel(data.draw(st.sampled_from(list(self.leased))), CANCELLED)

    @rule(settle=st.booleans())
    def step_decode(self, settle: bool) -> None:
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

    # --- the network --------------------------------------------------------------------------------------------------

    @rule()
    def connect(self) -> None:
        """Also without a break that anybody has noticed."""
        self.world.connect()
        self.connected = True

    @precondition(lambda self: self.connected)
    @rule()
    def disconnect(self) -> None:
        self.world.disconnect()
        self.connected = False

    @precondition(lambda self: self.world.to_decode)
    @rule(repeat=st.booleans(), swap=st.booleans())
    def deliver_to_decode(self, repeat: bool, swap: bool) -> None:
        self._mix(self.world.to_decode, repeat, swap)
        self.world.deliver_to_decode()

    @precondition(lambda self: self.world.to_prefill)
    @rule(repeat=st.booleans(), swap=st.booleans())
    def deliver_to_prefill(self, repeat: bool, swap: bool) -> None:
        self._mix(self.world.to_prefill, repeat, swap)
        self.world.deliver_to_prefill()

    @staticmethod
    def _mix(wire, repeat: bool, swap: bool) -> None:
        if repeat:
            wire.append(wire[0])
        if swap:
            wire.rotate(1)

    @precondition(lambda self: self.world.fabric.held)
    @rule(fate=st.sampled_from(["land", "fail", "corrupt"]))
    def end_a_write(self, fate: str) -> None:
        fabric = self.world.fabric
        write = fabric.held.pop(0)
        if fate == "fail":
            write.state = WriteState.FAILED
            fabric.lost.append(write)
        else:
            fabric.carry(write, corrupt=fate == "corrupt")

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def no_page_under_way_is_free(self) -> None:
        free = {self.world.target.memory.page_address(page) for page in self.free}
        for write in [*self.world.fabric.held, *self.world.fabric.lost]:
            assert not free & {target for _, target in write.moves}, "a page was given back under its writer's hands"

    @invariant()
    def every_page_has_one_owner(self) -> None:
        owned = self.free + [page for pages in self.leased.values() for page in pages]
        assert sorted(owned) == list(range(POOL))

    def teardown(self) -> None:
        """The network heals, the dead are dead: everything must end, and every page come home."""
        world = self.world
        world.fabric.hold = False
        world.connect()
        for _ in range(6):
            world.fabric.release()
            for handoff in list(self.prefill.pages):
                self.prefill.computed.pop(handoff, None)
                world.sender.cancel(handoff, CANCELLED)
            for handoff in list(self.offers):
                self.offers.pop(handoff)
                world.receiver.refuse(handoff, CANCELLED)
            self.step_prefill()
            world.deliver()
            self.step_decode(settle=True)
        assert world.sender.active == world.receiver.active == 0
        assert world.receiver.quarantined == []
        assert sorted(self.free) == sorted(self.prefill.free) == list(range(POOL))


Handoffs.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestHandoffs = Handoffs.TestCase

"""A control process as a witness: it answers for its host's kernel, and relays the rest."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from cluster import process_identity
from cluster.engine_messages import FromPeer, PeerUp
from cluster.errors import StaleFence, UnknownMessage
from cluster.layout import KVLayout
from cluster.links import LinkClosed
from cluster.messages import DeathAsked, DeathWitnessed, Message, Offer, PeerHello, Role
from cluster.peers import PeerTable, Witnesses, require_compatible
from tests.unit.kv_transfer.world import fence

LAYOUT = KVLayout("model", "float32", 16, 2, 1, 8)


class Wire:
    """A link whose other side says these messages, and then goes."""

    def __init__(self, *said: Message) -> None:
        self._said = list(said)
        self.heard: list[Message] = []

    def post(self, message: Message) -> None:
        self.heard.append(message)

    async def receive(self) -> Message:
        if not self._said:
            raise LinkClosed("gone")
        return self._said.pop(0)


async def relayed(wire: Wire, elsewhere: Witnesses | None = None) -> list[Message]:
    """What the engine process hears from that peer."""
    posted: list[Message] = []
    table = PeerTable(posted.append, lambda count: None, elsewhere)
    ours, theirs = (PeerHello(role.value, role, 7, LAYOUT, "memory", b"", process_identity.current()) for role in Role)
    table.open(ours)
    with pytest.raises(LinkClosed):
        await table.relay(ours, theirs, wire)
    return [message.message for message in posted if isinstance(message, FromPeer)]


def dead_process():
    """The identity of a process that has just ended."""
    code = (
        "import msgspec; from cluster.process_identity import current; print(msgspec.json.encode(current()).decode())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    return msgspec.json.decode(told, type=type(process_identity.current()))


async def test_the_dead_of_our_host_are_witnessed_and_the_living_are_not():
    dead, alive = dead_process(), process_identity.current()
    elsewhere = msgspec.structs.replace(dead, boot_id="of another host")
    wire = Wire(DeathAsked(alive), DeathAsked(elsewhere), DeathAsked(dead))
    assert await relayed(wire) == [], "the engine process has no part in it"
    assert wire.heard == [DeathWitnessed(dead)]


async def test_the_further_hosts_of_a_worker_are_asked_too():
    class Elsewhere:
        def is_dead(self, process):
            return process == dead

    dead = msgspec.structs.replace(process_identity.current(), boot_id="of another host of ours")
    unknown = msgspec.structs.replace(dead, pid=dead.pid + 1)
    wire = Wire(DeathAsked(unknown), DeathAsked(dead))
    assert await relayed(wire, Elsewhere()) == []
    assert wire.heard == [DeathWitnessed(dead)]


async def test_handoffs_and_testimonies_go_to_the_engine_process():
    said = [Offer(fence(), 5), DeathWitnessed(process_identity.current())]
    assert await relayed(Wire(*said)) == said


async def test_what_does_not_belong_between_workers_ends_the_link():
    table = PeerTable(lambda message: None, lambda count: None)
    hello = PeerHello("p", Role.PREFILL, 7, LAYOUT, "memory", b"", process_identity.current())
    table.open(hello)
    with pytest.raises(UnknownMessage, match="PeerUp"):
        await table.relay(hello, hello, Wire(PeerUp(hello)))


def hello_of(role: Role, epoch: int, to_epoch: int = 0) -> PeerHello:
    identity = process_identity.current()
    return PeerHello(role.value, role, epoch, LAYOUT, "memory", b"", identity, to_epoch=to_epoch)


@pytest.mark.parametrize("to_epoch", [0, 7])
def test_a_hello_to_this_life_or_to_any_is_taken(to_epoch):
    require_compatible(hello_of(Role.DECODE, 7), hello_of(Role.PREFILL, 5, to_epoch))


def test_a_hello_to_an_earlier_life_at_this_address_is_refused_before_anything_else_is_compared():
    theirs = msgspec.structs.replace(hello_of(Role.PREFILL, 5, to_epoch=6), transfer="another")
    with pytest.raises(StaleFence, match=r"epoch 7.* for 6"):
        require_compatible(hello_of(Role.DECODE, 7), theirs)

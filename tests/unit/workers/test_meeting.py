"""Prefill dials and decode accepts, over a real link: which life of the other each of them means."""

from __future__ import annotations

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from cluster import process_identity
from cluster.config import Model, Topology
from cluster.engine_messages import PeerUp
from cluster.errors import StaleFence
from cluster.layout import KVLayout
from cluster.messages import Member, Message, ModelCard, PeerHello, Role
from cluster.metrics import render
from cluster.peers import PeerTable
from cluster.worker_shell import EngineCommand, WorkerShell
from decode_worker.control import PeerListener
from prefill_worker.control import PeerDialer

LAYOUT = KVLayout("model", "float32", 16, 2, 1, 8)
PREFILL_EPOCH, DECODE_EPOCH = 5, 7
REFUSED = 'baton_refused_links_total{link="peer",role="decode",worker="decode"}'


def hello(role: Role, epoch: int) -> PeerHello:
    return PeerHello(role.value, role, epoch, LAYOUT, "memory", b"", process_identity.current())


class Meeting:
    """A decode worker's door, and a prefill worker that comes to it. Neither has an engine process."""

    def __init__(self) -> None:
        command = EngineCommand("none", [], {})
        self.decode = WorkerShell("decode", Role.DECODE, Topology(model=Model(path="none")), command)
        PeerListener(self.decode)
        self.decode.peers.open(hello(Role.DECODE, DECODE_EPOCH))
        self.server = TestServer(self.decode.app)
        self.met: list[Message] = []
        self.peers = PeerTable(self._meet, lambda count: None)
        self.peers.open(hello(Role.PREFILL, PREFILL_EPOCH))

    async def __aenter__(self) -> Meeting:
        await self.server.start_server()
        self.session = aiohttp.ClientSession()
        self.dialer = PeerDialer(self.session, self.peers)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.session.close()
        await self.server.close()

    def _meet(self, message: Message) -> None:
        """What prefill's engine process would hear; the link ends with it."""
        self.met.append(message)
        if isinstance(message, PeerUp):
            raise EndOfTest

    def member(self, epoch: int) -> Member:
        """As the roster has it."""
        url = str(self.server.make_url("")).rstrip("/")
        return Member("decode", Role.DECODE, epoch, url, LAYOUT, ModelCard("m", 512, 100), "memory", 10, 4)

    def refusals(self) -> float:
        lines = render(self.decode.metrics.registry).decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(REFUSED))


class EndOfTest(Exception):
    pass


async def test_both_say_whom_they_mean_and_meet():
    async with Meeting() as meeting:
        with pytest.raises(EndOfTest):
            await meeting.dialer._connect(meeting.member(DECODE_EPOCH))
        (up,) = meeting.met
        assert (up.hello.epoch, up.hello.to_epoch) == (DECODE_EPOCH, PREFILL_EPOCH)
        assert meeting.refusals() == 0


async def test_a_hello_to_the_former_life_at_an_address_is_refused_and_counted():
    async with Meeting() as meeting:
        with pytest.raises(StaleFence, match=f"epoch {DECODE_EPOCH}"):
            await meeting.dialer._connect(meeting.member(DECODE_EPOCH - 1))
        assert meeting.met == []
        assert meeting.refusals() == 1

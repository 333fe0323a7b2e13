"""A worker that talks nonsense: its link ends, again and again; the router and everybody's answers do not."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from cluster.messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    Emitted,
    Grant,
    Heartbeat,
    Load,
    Role,
    Tokens,
    WorkerHello,
)
from tests.frames import FrameMaker
from tests.process.fake_worker import DAMAGED, Behaviour, FakeWorker
from tests.process.router_house import House, demo_text, pair

FRAMES = 150


@pytest.fixture(scope="module")
def text():
    return demo_text()


async def test_a_worker_that_talks_nonsense_harms_nobody(text):
    liar = FakeWorker("decode-1", Role.DECODE, 22)
    async with House(text, [*pair(), liar]) as house:
        undisturbed = (await house.complete(max_tokens=8))["choices"][0]["text"]
        fences = iter(range(1_000_000))
        make = FrameMaker(
            7,
            {
                "worker": lambda: make.one_of(("decode-1", "decode-0")),
                "epoch": lambda: make.one_of((22, 21)),
                "decode_epoch": lambda: make.one_of((22, 21)),
                "request": lambda: make.one_of(
                    (liar.attempts[-1].fence.request if liar.attempts else "", str(next(fences)))
                ),
            },
        )
        for number in range(FRAMES):
            frame = make.message(
                make.one_of((Tokens, AttemptStarted, AttemptFinished, AttemptFailed, Heartbeat, WorkerHello, Grant))
            )
            frame = make.one_of((frame, frame, make.damaged(frame), make.noise()))
            for link in list(liar._links):
                with contextlib.suppress(ConnectionError, RuntimeError):
                    await link._socket.send_bytes(frame)
            if number % 10 == 0:
                answers = await asyncio.gather(*(house.complete(max_tokens=8) for _ in range(3)))
                assert {answer["choices"][0]["text"] for answer in answers} == {undisturbed}
        assert not house.running.done(), "the router goes on"
        assert house.server.fleet.integrity_errors() == []
        await house.until(lambda: {"prefill-0", "decode-0"} <= house.live())
        assert (await house.complete(max_tokens=8))["choices"][0]["text"] == undisturbed


async def test_a_worker_speaks_for_itself_alone(text):
    gate = asyncio.Event()
    liar = FakeWorker("decode-1", Role.DECODE, 22)
    async with House(text, [*pair(None, Behaviour(gate=gate)), liar], lease_seconds=0.5) as house:
        await liar.leave()
        await house.until(lambda: house.live() == {"prefill-0", "decode-0"})
        asking = asyncio.create_task(house.complete(max_tokens=4))
        await house.until(lambda: bool(house.workers["decode-0"].attempts))
        fence = house.workers["decode-0"].attempts[0].fence
        liar.tell(Tokens([Emitted(fence, offset, 5) for offset in range(4)]))
        liar.tell(AttemptFailed(fence, Role.DECODE, Role.DECODE, DAMAGED))
        liar.tell(Heartbeat("decode-0", 21, Load(ready=False)))
        await house.until(lambda: "AttemptFailed" in stale(house) and "Heartbeat" in stale(house))
        assert "decode-0" in house.live()
        gate.set()
        assert (await asking)["choices"][0]["finish_reason"] == "length"
        assert house.workers["prefill-0"].attempts[0].fence == fence and len(house.workers["prefill-0"].attempts) == 1


def stale(house: House) -> set[str]:
    """The kinds of messages that were refused."""
    [family] = house.server.metrics.stale.collect()
    return {sample.labels["kind"] for sample in family.samples}

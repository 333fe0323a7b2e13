"""Which decode workers a prefill worker dials, as the roster changes."""

from __future__ import annotations

import asyncio

import pytest

from cluster.layout import KVLayout
from cluster.links import LinkClosed
from cluster.messages import Member, ModelCard, Role
from prefill_worker.control import PeerDialer

LAYOUT = KVLayout("model", "float32", 16, 2, 1, 8)


def member(worker: str = "decode-0", epoch: int = 7, role: Role = Role.DECODE) -> Member:
    return Member(worker, role, epoch, "http://127.0.0.1:1", LAYOUT, ModelCard("m", 512, 100), "nixl", 10, 4)


class Dialer(PeerDialer):
    """Notes whom it dials; a link lives until the test ends it."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.dialed: list[tuple[str, int]] = []
        self.links: dict[tuple[str, int], asyncio.Event] = {}

    async def _connect(self, member: Member) -> None:
        key = (member.worker, member.epoch)
        self.dialed.append(key)
        self.links[key] = asyncio.Event()
        await self.links[key].wait()
        raise LinkClosed("ended by the test")


@pytest.fixture
async def dialer():
    made = Dialer()
    yield made
    await made.close()


async def until(condition) -> None:
    """Lets the tasks run, for at most some seconds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come to pass")


async def test_decode_workers_are_dialed_and_prefill_workers_are_not(dialer):
    dialer.on_change([member(), member("prefill-1", role=Role.PREFILL)], [])
    await until(lambda: dialer.dialed)
    assert dialer.dialed == [("decode-0", 7)]


async def test_a_worker_that_bootstrap_lost_and_found_keeps_its_one_link(dialer):
    dialer.on_change([member()], [])
    await until(lambda: dialer.dialed)
    dialer.on_change([], [member()])
    dialer.on_change([member()], [])
    await asyncio.sleep(0)
    assert dialer.dialed == [("decode-0", 7)]


async def test_a_broken_link_is_dialed_again_while_the_roster_has_the_worker(dialer):
    dialer.on_change([member()], [])
    await until(lambda: dialer.dialed)
    dialer.links["decode-0", 7].set()
    await until(lambda: len(dialer.dialed) == 2)


async def test_a_worker_that_left_is_not_dialed_again_once_its_link_ends(dialer):
    dialer.on_change([member()], [])
    await until(lambda: dialer.dialed)
    dialer.on_change([], [member()])
    dialer.links["decode-0", 7].set()
    await until(lambda: not dialer._tasks)
    assert dialer.dialed == [("decode-0", 7)]


async def test_a_restarted_worker_is_dialed_beside_the_link_to_its_former_life(dialer):
    dialer.on_change([member(epoch=7)], [])
    await until(lambda: dialer.dialed)
    dialer.on_change([member(epoch=8)], [member(epoch=7)])
    await until(lambda: len(dialer.dialed) == 2)
    assert dialer.dialed[1] == ("decode-0", 8)
    dialer.links["decode-0", 7].set()
    await until(lambda: len(dialer._tasks) == 1)
    assert len(dialer.dialed) == 2

"""What bootstrap's shell adds to the roster: it knows when it was stuck itself."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp.test_utils import TestClient, TestServer

from bootstrap.server import BootstrapServer
from cluster.config import Bootstrap
from cluster.layout import KVLayout
from cluster.links import dial
from cluster.messages import Member, ModelCard, Register, Registered, Role

INTERVAL = 0.01
CONFIG = Bootstrap(heartbeat_seconds=4 * INTERVAL, lease_seconds=50 * INTERVAL)


class HandClock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time


@pytest.fixture
async def bootstrap():
    """A client, and the clock."""
    clock = HandClock()
    async with TestClient(TestServer(BootstrapServer(CONFIG, clock).application())) as client:
        yield client, clock


async def members(client) -> set[str]:
    async with client.get("/targets") as reply:
        return {target["labels"]["__meta_baton_worker"] for target in await reply.json()}


async def test_a_bootstrap_that_was_stopped_blames_nobody_for_its_silence(bootstrap):
    client, clock = bootstrap
    layout = KVLayout("model", "float32", 16, 2, 1, 8)
    member = Member("decode-0", Role.DECODE, 7, "http://127.0.0.1:1", layout, ModelCard("m", 512, 100), "nixl", 10, 4)
    link = await dial(client.session, str(client.make_url("/members")))
    link.post(Register(member))
    assert isinstance(await link.receive(), Registered)

    clock.time += 100 * CONFIG.lease_seconds  # in one leap
    await asyncio.sleep(5 * INTERVAL)
    assert await members(client) == {"decode-0"}

    async def fall_silent() -> None:
        while await members(client):
            clock.time += INTERVAL / 2

    await asyncio.wait_for(fall_silent(), 20)
    await link.close()

"""The WebSocket that carries messages between processes."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cluster import links
from cluster.access.security import ClusterSecurity
from cluster.config import Security
from cluster.engine_messages import Stop
from cluster.errors import UnknownMessage
from cluster.links import Backoff, Link, LinkClosed, accept, dial
from cluster.messages import Watch


class Pair:
    """A server's link and a client's, joined."""

    def __init__(self) -> None:
        self.accepted: asyncio.Queue[Link] = asyncio.Queue()
        self.done = asyncio.Event()
        app = web.Application()
        app.router.add_get("/link", self._serve)
        self.server = TestServer(app)

    async def _serve(self, request):
        link = await accept(request)
        self.accepted.put_nowait(link)
        await self.done.wait()
        await link.close()
        return web.Response()


@pytest.fixture
async def pair():
    made = Pair()
    await made.server.start_server()
    async with aiohttp.ClientSession() as session:
        made.url = str(made.server.make_url("/link"))
        made.session = session
        made.client = await dial(session, made.url)
        made.served = await made.accepted.get()
        yield made
        made.done.set()
        await made.client.close()
    await made.server.close()


async def test_messages_arrive_in_order_both_ways(pair):
    for number in range(100):
        pair.client.post(Watch(str(number)))
        pair.served.post(Watch(str(-number)))
    assert [(await pair.served.receive()).watcher for _ in range(100)] == [str(n) for n in range(100)]
    assert [(await pair.client.receive()).watcher for _ in range(100)] == [str(-n) for n in range(100)]


async def test_what_is_posted_before_close_still_arrives(pair):
    pair.client.post(Watch("last"))
    await pair.client.close()
    assert await pair.served.receive() == Watch("last")
    with pytest.raises(LinkClosed):
        await pair.served.receive()


async def test_a_frame_that_is_no_message_raises_and_a_text_frame_too(pair):
    await pair.client._socket.send_bytes(b"\x81\xa4type\xa3Foo")
    with pytest.raises(UnknownMessage, match="Foo"):
        await pair.served.receive()
    await pair.client._socket.send_str("hello")
    with pytest.raises(UnknownMessage):
        await pair.served.receive()


async def test_what_only_a_workers_own_processes_say_is_refused_from_the_network(pair):
    pair.client.post(Stop())
    with pytest.raises(UnknownMessage, match="Stop"):
        await pair.served.receive()


async def test_a_reader_that_is_too_slow_loses_its_link_and_not_our_memory(pair, monkeypatch):
    monkeypatch.setattr(links, "MAX_OUTBOX", 10)
    for _ in range(12):
        pair.client.post(Watch("much"))
    assert pair.client.closed
    pair.client.post(Watch("more"))  # dropped, no error


async def test_nobody_at_the_address_is_told_plainly(pair, unused_tcp_port):
    with pytest.raises(LinkClosed, match=f"127.0.0.1:{unused_tcp_port}"):
        await dial(pair.session, f"http://127.0.0.1:{unused_tcp_port}/link")


def test_backoff_doubles_to_its_limit_and_starts_over():
    backoff = Backoff(0.1, 0.5)
    assert [round(backoff.next(), 3) for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    backoff.reset()
    assert backoff.next() == 0.1


async def test_one_process_holds_links_to_more_workers_than_a_browser_has_connections(pair):
    async with ClusterSecurity(Security()).session() as session:
        dialed = await asyncio.wait_for(asyncio.gather(*(dial(session, pair.url) for _ in range(110))), 30)
        assert not any(link.closed for link in dialed)
        pair.done.set()
        await asyncio.gather(*(link.close() for link in dialed))


async def test_who_goes_before_its_link_is_accepted_is_no_defect(caplog):
    arrived, over = asyncio.Event(), asyncio.Event()

    async def serve(request):
        arrived.set()
        while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        try:
            return await accept(request)
        finally:
            over.set()

    app = web.Application()
    app.router.add_get("/link", serve)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession() as session:
        dialing = asyncio.create_task(dial(session, f"http://127.0.0.1:{runner.addresses[0][1]}/link"))
        await asyncio.wait_for(arrived.wait(), 10)
        dialing.cancel()
        await asyncio.gather(dialing, return_exceptions=True)
        await asyncio.wait_for(over.wait(), 10)
    await runner.cleanup()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []

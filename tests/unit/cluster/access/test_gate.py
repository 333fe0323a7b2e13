"""Only who knows the cluster's secret gets past the gate, and a server that does not know it gets nothing either."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp import web

from cluster.access.gate import close_gate
from cluster.access.keys import KeyRing, KeySource
from cluster.access.security import ClusterSecurity
from cluster.clock import MonotonicClock
from cluster.config import Security
from cluster.http_server import HttpServer
from cluster.links import LinkClosed, accept, dial
from cluster.messages import Watch

SECRET = "correct horse battery staple"
PLAIN = Security()


class Server:
    """An application behind the gate: a link that repeats, and an endpoint that changes something."""

    def __init__(self, secret: str | None = SECRET) -> None:
        self.refusals: list[str] = []
        self.changed: list[bytes] = []
        app = web.Application()
        app.router.add_get("/link", self._link)
        app.router.add_get("/health", self._health)
        app.router.add_post("/drain", self._drain)
        if secret is not None:
            ring = KeyRing(KeySource("test", None, "TEST"), tuple(secret.encode().split(b"\n")), MonotonicClock(), None)
            close_gate(app, ring, {"/health"}, self.refusals.append, MonotonicClock())
        self._server = HttpServer(app, shutdown_seconds=0.1)

    async def __aenter__(self) -> Server:
        self.url = await self._server.start("127.0.0.1", 0, "")
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._server.stop()

    async def _link(self, request):
        link = await accept(request)
        try:
            while True:
                link.post(await link.receive())
        except LinkClosed:
            await link.close()
        return web.Response()

    async def _health(self, request):
        return web.Response(text="ok")

    async def _drain(self, request):
        self.changed.append(await request.read())
        return web.Response(text="drained")


@pytest.fixture
def session_with(monkeypatch):
    """Makes the session that a process with this secret would use."""

    def make(secret: str | None) -> aiohttp.ClientSession:
        monkeypatch.delenv("BATON_CLUSTER_SECRET", raising=False)
        if secret is not None:
            monkeypatch.setenv("BATON_CLUSTER_SECRET", secret)
        return ClusterSecurity(PLAIN).session()

    return make


async def test_links_and_requests_of_the_cluster_pass(session_with):
    async with Server() as server, session_with(SECRET) as session:
        link = await dial(session, f"{server.url}/link")
        link.post(Watch("me"))
        assert await asyncio.wait_for(link.receive(), 5) == Watch("me")
        await link.close()
        async with session.post(f"{server.url}/drain", json={"grace": 5}) as response:
            assert response.status == 200
        assert server.changed == [b'{"grace": 5}']
        assert set(server.refusals) <= {"no_proof"}


@pytest.mark.parametrize("secret", [None, "another secret of length"])
async def test_others_are_refused_and_counted(session_with, secret):
    async with Server() as server, session_with(secret) as session:
        with pytest.raises(LinkClosed):
            await dial(session, f"{server.url}/link")
        with pytest.raises((LinkClosed, aiohttp.ClientError)):
            async with session.post(f"{server.url}/drain") as response:
                response.raise_for_status()
        assert server.changed == []
        assert server.refusals.count("wrong_secret") == (0 if secret is None else 2)
        assert server.refusals.count("no_proof") == 2


async def test_probes_are_open_and_the_refusal_says_how_to_prove_and_nothing_else():
    async with Server() as server, aiohttp.ClientSession() as session:
        async with session.get(f"{server.url}/health") as response:
            assert response.status == 200
        async with session.get(f"{server.url}/no-such-path") as response:
            assert response.status == 401, "what there is, is nobody's business"
            assert response.headers["WWW-Authenticate"].startswith("Baton challenge=")
            assert SECRET not in await response.text()


async def test_a_server_that_does_not_know_the_secret_is_not_spoken_to(session_with):
    async with Server(secret=None) as impostor, session_with(SECRET) as session:
        with pytest.raises(LinkClosed, match="does not ask for proof"):
            await dial(session, f"{impostor.url}/link")


async def test_a_server_that_only_plays_the_first_step_is_found_out(session_with):
    async def challenge(request):
        if "Authorization" in request.headers:
            return web.Response()
        return web.Response(status=401, headers={"WWW-Authenticate": "Baton challenge=abc-def-0123"})

    app = web.Application()
    app.router.add_get("/link", challenge)
    server = HttpServer(app, shutdown_seconds=0.1)
    url = await server.start("127.0.0.1", 0, "")
    async with session_with(SECRET) as session:
        with pytest.raises(LinkClosed, match="does not prove"):
            await dial(session, f"{url}/link")
    await server.stop()


async def test_what_was_heard_on_the_wire_is_of_no_use_again(session_with):
    heard: list[str] = []

    async def listen(request, handler):
        response = await handler(request)
        heard.append(request.headers.get("Authorization", ""))
        return response

    async with Server() as server, Server() as other, session_with(SECRET) as session, aiohttp.ClientSession() as thief:
        async with session.post(f"{server.url}/drain", middlewares=[*session._middlewares, listen]) as response:
            assert response.status == 200
        stolen = {"Authorization": heard[-1]}
        for url, reason in ((server.url, "replayed"), (other.url, "foreign_challenge")):
            async with thief.post(f"{url}/drain", headers=stolen) as response:
                assert response.status == 401
            assert (server if url == server.url else other).refusals[-1] == reason
        async with thief.post(f"{server.url}/drain", headers=stolen, data=b"more") as response:
            assert response.status == 401
        assert len(server.changed) == 1 and other.changed == []


async def test_a_secret_is_changed_without_a_stop(session_with):
    new = "a newer secret of length"
    async with Server(f"{new}\n{SECRET}") as server:
        for secret in (SECRET, new):
            async with session_with(secret) as session, session.post(f"{server.url}/drain") as response:
                assert response.status == 200

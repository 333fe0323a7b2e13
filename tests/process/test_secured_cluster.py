"""A whole cluster behind a secret, API keys and mutual TLS: it works as ever, strangers get nothing, members that talk
nonsense harm nobody, and nothing secret is written anywhere."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import sys
from typing import Any

import aiohttp
import msgspec
import pytest

from bench.cluster import Cluster
from cluster.access.security import ClusterSecurity, router_session
from cluster.config import Topology
from cluster.links import LinkClosed, dial
from cluster.messages import (
    Abort,
    Aborted,
    Ack,
    CancelAttempt,
    DecodeAttempt,
    Done,
    Grant,
    Heartbeat,
    Leave,
    Member,
    MemberStatus,
    Offer,
    PeerHello,
    PrefillAttempt,
    ProcessIdentity,
    Refused,
    Register,
    Role,
    RouterHello,
    Watch,
    encode,
)
from cluster.topology import load_topology
from tests.certificates import Authority
from tests.frames import FrameMaker
from tests.process.api import Api, eventually
from tests.process.conftest import TOPOLOGIES

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with the openssl program")

SECRET = "the-secret-of-this-cluster-alone"
KEY = "sk-the-key-of-these-tests"
PROMPT = [504, 3575, 282, 4649, 314]
FRAMES = 40
"""Per channel."""


class SecuredCluster(Cluster):
    """It is up when `baton up` says so: nobody else can ask it anything."""

    def _complete(self) -> bool:
        return "ready: " in self.output.read_text()

    @property
    def topology(self) -> Topology:
        return load_topology(self._topology, self._settings)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder)
    node, outside = authority.sign("node"), authority.sign("router")
    (folder / "secret").write_text(SECRET + "\n")
    (folder / "keys").write_text(KEY + "\n")
    tls = (
        f"certificate: {node.certificate}, key: {node.key}, ca: {authority.certificate}, client_certificates: required"
    )
    settings = (
        f"security.secret_file={folder / 'secret'}",
        f"security.tls={{{tls}}}",
        f"router.api_keys_file={folder / 'keys'}",
        f"router.tls={{certificate: {outside.certificate}, key: {outside.key}, ca: {authority.certificate}}}",
        "kv.pool_tokens=8192",
        "logging.level=debug",
    )
    with SecuredCluster(TOPOLOGIES / "demo.yaml", settings, folder / "logs") as running:
        yield running


@pytest.fixture
async def inside(cluster):
    """A session of the cluster's own."""
    async with ClusterSecurity(cluster.topology.security).session() as session:
        yield session


@pytest.fixture
async def api(cluster):
    topology = cluster.topology
    async with router_session(topology.router, topology.security) as session:
        yield Api(session, cluster.url.replace("http:", "https:"))


async def members(cluster, session) -> dict[Role, MemberStatus]:
    async with session.get(f"{cluster.topology.bootstrap_url}/workers") as response:
        assert response.status == 200
        found = msgspec.json.decode(await response.read(), type=dict[str, list[MemberStatus]])
    return {status.member.role: status for status in found["workers"]}


async def test_it_answers_who_has_a_key_and_the_baton_command_is_one_of_its_own(cluster, api):
    answer = await api.complete(PROMPT, max_tokens=4, temperature=0)
    assert len(answer.tokens) == 4
    chosen = [word for setting in cluster._settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "deploy.cli", "status", "--topology", str(cluster._topology), *chosen]
    status = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert status.returncode == 0 and "prefill-0" in status.stdout, status.stderr


async def test_strangers_get_nothing(cluster, inside):
    security = cluster.topology.security
    no_certificate = ssl.create_default_context(cafile=security.tls.ca)
    with_certificate = ClusterSecurity(security)._client_tls
    workers = await members(cluster, inside)
    url = workers[Role.DECODE].member.url
    assert url.startswith("https://")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=no_certificate)) as stranger:
        with pytest.raises(aiohttp.ClientError):
            await stranger.get(f"{url}/health")
        with pytest.raises(LinkClosed):
            await dial(stranger, f"{url}/peer")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=with_certificate)) as half:
        for base in (url, cluster.topology.bootstrap_url):
            async with half.get(f"{base}/health") as response:
                assert response.status == 200
        for method, path in (
            ("GET", f"{url}/peer"),
            ("GET", f"{url}/router"),
            ("GET", f"{url}/server_info"),
            ("POST", f"{url}/drain"),
            ("POST", f"{url}/profile/start"),
            ("GET", f"{cluster.topology.bootstrap_url}/members"),
            ("GET", f"{cluster.topology.bootstrap_url}/watch"),
            ("GET", f"{cluster.topology.bootstrap_url}/workers"),
        ):
            async with half.request(
                method, path, headers={"Authorization": "Baton challenge=a, nonce=b, proof=c"}
            ) as refusal:
                assert refusal.status == 401, path
            with pytest.raises(LinkClosed):
                await dial(half, path)
        async with half.get(f"{url}/metrics") as response:
            metrics = await response.text()
        assert 'baton_unauthorized_requests_total{reason="foreign_challenge"' in metrics
    after = await members(cluster, inside)
    assert {role: status.member.epoch for role, status in after.items()} == {
        role: status.member.epoch for role, status in workers.items()
    }


# --- nonsense from within --------------------------------------------------------------------------------------------


def maker(seed: int, workers: dict[Role, MemberStatus]) -> FrameMaker:
    """Knows what lets a frame come past the fence."""
    epochs = {f"{role.value}_epoch": (lambda epoch=status.member.epoch: epoch) for role, status in workers.items()}
    numbers = iter(range(1_000_000))
    return FrameMaker(
        seed, {**epochs, "version": lambda: RouterHello("x").version, "request": lambda: f"wild-{next(numbers)}"}
    )


async def talk(session: aiohttp.ClientSession, url: str, hello: list[bytes], frames: list[bytes]) -> None:
    """Says all that, with a new link whenever the other side has had enough."""
    waiting = list(frames)
    while waiting:
        link = await dial(session, url)
        try:
            for frame in hello:
                await link._socket.send_bytes(frame)
            while waiting and not link.closed:
                await link._socket.send_bytes(waiting.pop())
                try:
                    while not isinstance(await asyncio.wait_for(link.receive(), 0.01), Refused):
                        pass
                    break
                except asyncio.TimeoutError:
                    pass
        except (LinkClosed, ConnectionError, RuntimeError):
            pass
        finally:
            await link.close()


def wild(make: FrameMaker, kinds: tuple[Any, ...], count: int) -> list[bytes]:
    frames = []
    for _ in range(count):
        frame = make.message(make.one_of(kinds))
        frames.append(make.one_of((frame, frame, make.damaged(frame), make.noise())))
    return frames


def router_frames(make: FrameMaker, role: Role, count: int) -> list[bytes]:
    return wild(make, ((PrefillAttempt if role is Role.PREFILL else DecodeAttempt), CancelAttempt), count)


def peer_hello(member: Member) -> bytes:
    """Of a prefill worker that is not there, but fits."""
    nobody = ProcessIdentity("no such boot", "no namespace", 1, 1)
    return encode(PeerHello("prefill-9", Role.PREFILL, 7, member.layout, member.transfer, b"nowhere", nobody))


async def nonsense(
    session: aiohttp.ClientSession, bootstrap_url: str, workers: dict[Role, MemberStatus], seed: int, count: int
) -> None:
    make = maker(seed, workers)
    talks = [talk(session, f"{bootstrap_url}/{path}", [], wild(make, (Register, Heartbeat, Leave, Watch), count))
             for path in ("members", "watch")]  # fmt: skip
    hello = encode(RouterHello("router-of-nonsense"))
    for role, status in workers.items():
        talks.append(talk(session, f"{status.member.url}/router", [hello], router_frames(make, role, count)))
    decode = workers[Role.DECODE].member
    handoff = wild(make, (Offer, Done, Aborted, Grant, Ack, Abort, PeerHello), count)
    talks.append(talk(session, f"{decode.url}/peer", [peer_hello(decode)], handoff))
    await asyncio.gather(*talks)


LONG = pytest.param(300, 5, marks=[pytest.mark.soak, pytest.mark.timeout(600)], id="long")


@pytest.mark.parametrize(("count", "seed"), [pytest.param(FRAMES, 4, id="short"), LONG])
async def test_a_member_that_talks_nonsense_harms_nobody(cluster, inside, api, count, seed):
    before = await members(cluster, inside)
    undisturbed = (await api.complete(PROMPT, max_tokens=64, temperature=0)).tokens
    others = [asyncio.create_task(api.complete(PROMPT, max_tokens=64, temperature=0)) for _ in range(3)]
    await nonsense(inside, cluster.topology.bootstrap_url, before, seed, count)
    assert [(await each).tokens for each in others] == [undisturbed] * 3
    assert (await api.complete(PROMPT, max_tokens=64, temperature=0)).tokens == undisturbed

    async def idle() -> bool:
        now = await members(cluster, inside)
        return all(not any((load.queued, load.running, load.transfers, load.pages_used, load.pages_quarantined))
                   for load in (now[role].load for role in before if role in now))  # fmt: skip

    await eventually(idle, "nothing is left of it")
    after = await members(cluster, inside)
    for role, status in before.items():
        assert after[role].member == status.member, "the same life as before"
    for status in before.values():
        async with inside.get(f"{status.member.url}/metrics") as response:
            assert 'baton_refused_links_total{link="router"' in await response.text()


def test_nothing_secret_is_written_anywhere(cluster):
    """The last one: by now, all that was ever refused is in the logs."""
    texts = {path.name: path.read_text(errors="replace") for path in cluster.log_dir.iterdir() if path.is_file()}
    assert {"router.log", "bootstrap.log", "prefill-0.log", "decode-0.log", "topology.yaml", "up.out"} <= set(texts)
    private = [line for line in (cluster.log_dir.parent / "node.key").read_text().splitlines() if "-----" not in line]
    for name, text in texts.items():
        for secret in (SECRET, KEY, *private):
            assert secret not in text, name

"""A worker's control process beside an engine process that stalls, dies and leaves: a real one, without a model."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from pathlib import Path

import aiohttp
import msgspec
import psutil
import pytest
from yarl import URL

from cluster import worker_shell
from cluster.config import Bootstrap, Model, Restarts, Security, Topology, Worker
from cluster.errors import ConfigError, WorkerLost
from cluster.links import Link, LinkClosed, dial
from cluster.messages import (
    AttemptFailed,
    AttemptFinished,
    DecodeAttempt,
    Fence,
    FinishReason,
    Heartbeat,
    Refused,
    Role,
    RouterHello,
    Sampling,
    WorkerHello,
)
from cluster.process import EXIT_DONE, EXIT_RESTART
from cluster.tasks import cancel
from cluster.topology import dump_topology
from cluster.worker_shell import EngineCommand, WorkerShell
from tests.process.stand_ins.toy_engine import COMPUTE, DEAFEN, DIE, FINISH, HANG

STAND_INS = Path(__file__).parent / "stand_ins"
HEARTBEAT = 0.5
SOON = 10.0
TOPOLOGY = Topology(
    model=Model(path="toy"),
    bootstrap=Bootstrap(heartbeat_seconds=HEARTBEAT),
    worker=Worker(drain_seconds=0.5, stall_limit_seconds=2.0),
    restarts=Restarts(most=2),
)


class Membership:
    """What bootstrap would know."""

    def __init__(self, member) -> None:
        self.member = member
        self.left: str | None = None
        self._running = False

    async def run(self) -> None:
        self._running = True
        try:
            await asyncio.Event().wait()
        finally:
            self._running = False

    async def leave(self, reason: str) -> None:
        """Once `run` has been cancelled there is nobody to be told."""
        if self._running:
            self.left = self.left or reason


def toy_engines() -> list[psutil.Process]:
    """Those that live; the test run may have other children."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "toy_engine" in child.cmdline():
                found.append(child)
    return found


class House:
    """A shell at work, and all the memberships it has had."""

    def __init__(self, directory: Path, settings: Topology = TOPOLOGY) -> None:
        topology = directory / "t.yaml"
        topology.write_text(dump_topology(settings))
        arguments = ["--topology", str(topology), "--index", "0", "--name", "w", "--host", "127.0.0.1"]
        self.crashes = directory / "crashes"
        environment = {"PYTHONPATH": f"{STAND_INS}:{STAND_INS.parents[2]}", "CRASHES": str(self.crashes)}
        self.shell = WorkerShell("w", Role.DECODE, settings, EngineCommand("toy_engine", arguments, environment))
        self.lives: list[Membership] = []
        self.links: list[Link] = []

    async def start(self, host: str = "127.0.0.1", listen: str | None = None) -> None:
        await self.shell.listen(host, 0, listen)
        self.url = self.shell._url
        self.running = asyncio.ensure_future(self.shell.run(self._join))

    def _join(self, member):
        self.lives.append(Membership(member))
        return self.lives[-1]

    @property
    def engine(self) -> psutil.Process:
        (engine,) = toy_engines()
        return engine

    async def dial(self, http, router: str, epoch: int = 0) -> Link:
        self.links.append(await dial(http, f"{self.url}/router"))
        self.links[-1].post(RouterHello(router, epoch))
        return self.links[-1]

    async def close(self) -> None:
        await cancel(self.running)
        await self.shell.close()
        await asyncio.gather(*(link.close() for link in self.links))

    async def up(self, lives: int = 1):
        """Waits for this many lives, the last of them ready."""
        await until(lambda: len(self.lives) == lives or self.running.done())
        assert not self.running.done(), await self.running
        return self.lives[-1].member


async def until(condition, seconds: float = SOON) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.02)


@pytest.fixture
async def house(tmp_path, http):
    made = House(tmp_path)
    await made.start()
    yield made
    await made.close()


@pytest.fixture
async def http():
    async with aiohttp.ClientSession() as session:
        yield session


async def ask(http, house, path) -> tuple[int, dict]:
    async with http.get(house.url + path) as response:
        return response.status, await response.json()


async def says(http, house, path, status) -> dict:
    """Waits until a path answers so."""
    deadline = time.monotonic() + SOON
    while True:
        found, body = await ask(http, house, path)
        if found == status:
            return body
        assert time.monotonic() < deadline, f"{path} says {found}, {body}"
        await asyncio.sleep(0.02)


class Router:
    """A router's end of the link."""

    def __init__(self, link, member) -> None:
        self.link = link
        self.member = member
        self._number = 0

    @classmethod
    async def connect(cls, http, house) -> Router:
        link = await house.dial(http, "r")
        hello = await link.receive()
        assert isinstance(hello, WorkerHello), hello
        return cls(link, hello.member)

    def order(self, what: int, tenths: int) -> Fence:
        self._number += 1
        fence = Fence(f"request-{self._number}", 1, 0, self.member.epoch)
        self.link.post(DecodeAttempt(fence, [what, tenths], Sampling(max_tokens=1, seed=0), None))
        return fence

    async def hears(self, condition, seconds: float = SOON):
        """The first message that fulfils it."""

        async def listen():
            while True:
                message = await self.link.receive()
                if condition(message):
                    return message

        return await asyncio.wait_for(listen(), seconds)

    async def heartbeat(self, condition):
        return (await self.hears(lambda said: isinstance(said, Heartbeat) and condition(said.load))).load


async def test_a_dead_engine_process_is_replaced_at_once_and_everybody_is_told(house, http):
    first = await house.up()
    router = await Router.connect(http, house)
    begun = time.monotonic()
    house.engine.kill()
    with pytest.raises(LinkClosed):
        await router.hears(lambda message: False)
    assert time.monotonic() - begun < 1.0, "routers know in under a second"
    reason = (await says(http, house, "/ready", 503))["reason"]
    assert reason == "restarting: the engine process died (signal SIGKILL)"
    assert (await ask(http, house, "/live"))[0] == 200

    second = await house.up(lives=2)
    assert house.lives[0].left == "its engine process ended"
    assert (second.worker, second.url, second.layout) == (first.worker, first.url, first.layout)
    assert second.epoch > first.epoch
    assert (await ask(http, house, "/ready"))[0] == 200
    router = await Router.connect(http, house)
    assert router.member == second
    fence = router.order(FINISH, 0)
    await router.hears(lambda message: isinstance(message, AttemptFinished) and message.fence == fence)
    async with http.get(house.url + "/metrics") as response:
        metrics = await response.text()
    assert 'baton_engine_restarts_total{cause="death",role="decode",worker="w"} 1.0' in metrics
    assert 'baton_ready{role="decode",worker="w"} 1.0' in metrics


async def test_a_hello_meant_for_an_earlier_life_does_not_take_the_place_of_the_routers_connection(house, http):
    """A dial that was under way when the worker came back may arrive after the one that is meant for it."""
    member = await house.up()
    link = await house.dial(http, "r", member.epoch)
    assert isinstance(await link.receive(), WorkerHello)
    late = await house.dial(http, "r", member.epoch - 1)
    refused = await late.receive()
    assert isinstance(refused, Refused) and refused.error.code == "StaleFence"
    for _ in range(3):
        assert isinstance(await link.receive(), Heartbeat), "the router still hears of it"


async def test_an_engine_process_that_dies_again_and_again_is_given_up_with_its_reason(house):
    await house.up()
    house.crashes.touch()
    house.engine.kill()
    with pytest.raises(WorkerLost, match=r"told to crash; it has died 3 times within 300 s"):
        await house.running


async def test_an_engine_process_that_hangs_while_it_starts_is_replaced_too(house, monkeypatch):
    await house.up()
    monkeypatch.setattr(worker_shell, "START_SLACK_SECONDS", 0.5)
    house.crashes.write_text("hang")
    house.engine.kill()
    await until(lambda: house.shell._budget.restarts == 2)
    house.crashes.unlink()
    await house.up(lives=2)


async def test_an_engine_process_that_cannot_start_at_all_is_not_tried_again(tmp_path):
    house = House(tmp_path)
    house.crashes.touch()
    await house.start()
    with pytest.raises(ConfigError, match=r"^told to crash$"):
        await house.running
    await house.close()


async def test_a_stopped_engine_process_is_noticed_and_when_it_goes_on_it_is_ready_again(house, http):
    await house.up()
    router = await Router.connect(http, house)
    begun = time.monotonic()
    house.engine.suspend()
    load = await router.heartbeat(lambda load: not load.ready)
    assert time.monotonic() - begun < 3 * HEARTBEAT + 0.5, "with half a second for a busy machine"
    assert load.stalled.startswith("the engine process has made no progress for")
    status, body = await ask(http, house, "/ready")
    assert (status, body["reason"]) == (503, f"stalled: {house.shell.load().stalled}")
    house.engine.resume()
    load = await router.heartbeat(lambda load: load.ready)
    assert load.stalled == ""
    assert len(house.lives) == 1, "it was never replaced"


async def test_a_stall_without_end_is_ended_by_a_new_engine_process(house, http):
    await house.up()
    router = await Router.connect(http, house)
    router.order(HANG, 600)
    await says(http, house, "/ready", 503)
    assert (await ask(http, house, "/live"))[0] == 200
    await house.up(lives=2)
    assert (await says(http, house, "/ready", 200))["status"] == "ready"


async def test_a_transfer_thread_that_hangs_is_a_stall_too(house, http):
    await house.up()
    router = await Router.connect(http, house)
    router.order(DEAFEN, 18)
    load = await router.heartbeat(lambda load: load.stalled)
    assert load.stalled.startswith("the transfer thread has made no progress for")
    await router.heartbeat(lambda load: load.ready and not load.stalled)


async def test_a_step_far_longer_than_three_heartbeats_is_busy(house, http):
    await house.up()
    router = await Router.connect(http, house)
    fence = router.order(COMPUTE, 30)
    progress = []
    while True:
        message = await router.hears(lambda message: True)
        if isinstance(message, AttemptFinished):
            assert message.fence == fence
            break
        assert message.load.ready
        progress.append(message.load.progress)
    assert len(progress) > 3 and progress == sorted(set(progress)), "each heartbeat shows more"


async def test_a_drain_waits_for_what_finishes_and_gives_back_the_rest(house, http):
    await house.up()
    router = await Router.connect(http, house)
    short, long = router.order(FINISH, 2), router.order(FINISH, 600)
    await until(lambda: house.shell.load().running == 2)
    async with http.post(house.url + "/drain") as response:
        assert response.status == 202
    await router.heartbeat(lambda load: load.draining and not load.ready)
    assert house.lives[0].left == "draining"
    late = router.order(FINISH, 0)
    refused = await router.hears(lambda message: isinstance(message, AttemptFailed))
    assert (refused.fence, refused.error.code, refused.blame) == (late, "Draining", Role.DECODE)
    finished = await router.hears(lambda message: isinstance(message, AttemptFinished))
    assert (finished.fence, finished.reason) == (short, FinishReason.LENGTH)
    given_back = await router.hears(lambda message: isinstance(message, AttemptFailed))
    assert (given_back.fence, given_back.error.code) == (long, "Draining")
    assert (await ask(http, house, "/ready"))[1]["reason"] == "draining"
    await asyncio.wait_for(house.running, SOON)
    assert house.shell.exit_code == EXIT_DONE


async def test_a_drain_may_ask_for_a_restart_and_takes_no_new_routers(house, http):
    await house.up()
    router = await Router.connect(http, house)
    router.order(FINISH, 600)
    await until(lambda: house.shell.load().running == 1)
    async with http.post(house.url + "/drain", data=msgspec.json.encode({"restart": True})) as response:
        assert response.status == 202
    link = await house.dial(http, "another")
    assert isinstance(await link.receive(), Refused)
    await asyncio.wait_for(house.running, SOON)
    assert house.shell.exit_code == EXIT_RESTART


async def test_a_drain_that_nobody_can_read_is_refused(house, http):
    await house.up()
    async with http.post(house.url + "/drain", data=b"now") as response:
        assert response.status == 400
    assert not house.running.done()


async def test_an_engine_process_that_dies_while_it_drains_ends_the_worker_in_peace(house, http):
    await house.up()
    router = await Router.connect(http, house)
    router.order(FINISH, 600)
    await until(lambda: house.shell.load().running == 1)
    house.shell.ask_drain()
    router.order(DIE, 0)
    house.engine.send_signal(signal.SIGKILL)
    await asyncio.wait_for(house.running, SOON)
    assert toy_engines() == []


async def test_a_worker_in_a_container_listens_everywhere_and_tells_the_address_that_others_reach(tmp_path, http):
    house = House(tmp_path, msgspec.structs.replace(TOPOLOGY, security=Security(allow_insecure=True)))
    await house.start("127.0.0.2", listen="0.0.0.0")
    try:
        member = await house.up()
        assert member.url.startswith("http://127.0.0.2:")
        for host in ("127.0.0.2", "127.0.0.1"):
            async with http.get(URL(member.url).with_host(host) / "live") as response:
                assert response.status == 200
    finally:
        await house.close()

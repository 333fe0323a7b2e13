"""One size of a cluster: what its bootstrap and its router cost, idle and at work, and how soon they notice."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from bench.cluster import Workers, free_ports
from bench.control_plane.servers import ServerProcess
from bench.control_plane.swarm import Command, Count, Cut, Hush, Revive, Swarm
from bench.statistics import Repeated
from cluster.access.security import ClusterSecurity
from cluster.config import Bootstrap, Decode, Model, Prefill, Router, Security, Topology
from cluster.errors import LaunchError
from cluster.model_files import DEMO_MODEL
from cluster.topology import dump_topology

READY_SECONDS = 180.0
POLL_SECONDS = 0.05
SLOW_POLL_SECONDS = 0.25
"""Where the asking itself would be a part of what is measured."""
SETTLE_SECONDS = 3.0
"""After a start, or a storm: all that it has made is done."""
PROMPT_TOKENS = 64
ANSWER_TOKENS = 2
CLIENTS = 8

Say = Callable[[str], None]


class Losses(msgspec.Struct, frozen=True):
    """Seconds from a worker's end until it gets no new work (router), or is a member no more (bootstrap)."""

    bootstrap: Repeated
    router: Repeated


class Recovered(msgspec.Struct, frozen=True):
    """After one process was killed and started anew."""

    seconds: float
    """From its start until it knows all workers again; the start of its interpreter is in it."""
    bootstrap_cpu_seconds: float
    router_cpu_seconds: float


class Placed(msgspec.Struct, frozen=True):
    """What a request costs the router, of 64 prompt and 2 output tokens."""

    requests: int
    router_cpu_seconds: float
    """Of one request, all in all."""
    placement_seconds: float
    """Of one request: the choice of its workers, by the router's own metric."""


class Measured(msgspec.Struct, frozen=True):
    """CPU shares are of one core."""

    workers: int
    bootstrap_cpu: float
    router_cpu: float
    swarm_cpu: float
    """Of the simulated workers, all in one process: near 1 it is they who are slow."""
    told_per_second: float
    """Messages of bootstrap to prefill workers, which follow the roster, while nothing happens."""
    bootstrap_bytes: int
    router_bytes: int
    broken: Losses
    silent: Losses
    placed: Placed
    bootstrap_anew: Recovered
    router_anew: Recovered


class _Seen(msgspec.Struct, frozen=True):
    worker: str
    live: bool


class _Fleet(msgspec.Struct, frozen=True):
    """Of the router's `GET /status`, what is looked at."""

    workers: list[_Seen]


class Plane:
    """A running bootstrap, router and swarm. Made by `control_plane`."""

    def __init__(self, topology: Topology, bootstrap: ServerProcess, router: ServerProcess, swarm: Swarm,
                 inside: aiohttp.ClientSession, outside: aiohttp.ClientSession) -> None:  # fmt: skip
        self.topology = topology
        self.bootstrap = bootstrap
        self.router = router
        self.swarm = swarm
        self._inside = inside
        self._outside = outside
        self.router_url = f"http://127.0.0.1:{topology.router.port}"

    async def members(self) -> set[str]:
        """Bootstrap's word; empty while it is away."""
        answer = await self._get(self._inside, f"{self.topology.bootstrap_url}/workers")
        found = msgspec.json.decode(answer, type=Workers) if answer else Workers([])
        return {status.member.worker for status in found.workers}

    async def live(self) -> set[str]:
        """Those that get work, by the router's word; empty while it is away."""
        answer = await self._get(self._outside, f"{self.router_url}/status")
        found = msgspec.json.decode(answer, type=_Fleet) if answer else _Fleet([])
        return {seen.worker for seen in found.workers if seen.live}

    async def complete(self) -> None:
        """All workers are members, and live. Raises `LaunchError` if that does not come to be."""

        async def everybody() -> bool:
            return len(await self.members()) == len(await self.live()) == self.swarm.workers

        await until(everybody, f"{self.swarm.workers} live workers", SLOW_POLL_SECONDS)

    async def request(self, number: int) -> None:
        """Raises `LaunchError` if it is not answered."""
        prompt = [(number * 7919 + place) % 40000 + 100 for place in range(PROMPT_TOKENS)]
        body = {"model": self.topology.served_model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True}
        async with self._outside.post(f"{self.router_url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise LaunchError(f"a request was not answered: {await response.text()}")
            await response.read()

    async def placement_seconds(self) -> float:
        """The sum over all requests so far."""
        async with self._outside.get(f"{self.router_url}/metrics") as response:
            text = await response.text()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == "baton_placement_seconds_sum")

    @staticmethod
    async def _get(session: aiohttp.ClientSession, url: str) -> bytes:
        """Nothing while nobody is there to answer."""
        try:
            async with session.get(url) as response:
                return await response.read() if response.status == 200 else b""
        except aiohttp.ClientConnectionError:
            return b""


@asynccontextmanager
async def control_plane(workers: int, folder: Path) -> AsyncIterator[Plane]:
    """A cluster with a secret, half of whose workers prefill."""
    topology, file = _topology(workers, folder)
    async with AsyncExitStack() as stack:
        bootstrap = stack.enter_context(ServerProcess("bootstrap", file, folder / "bootstrap.log"))
        router = stack.enter_context(ServerProcess("router", file, folder / "router.log"))
        swarm = await stack.enter_async_context(Swarm(file, workers, folder / "swarm.log"))
        inside = await stack.enter_async_context(ClusterSecurity(topology.security).session())
        outside = await stack.enter_async_context(aiohttp.ClientSession())
        plane = Plane(topology, bootstrap, router, swarm, inside, outside)
        await plane.complete()
        await asyncio.sleep(SETTLE_SECONDS)
        yield plane


def _topology(workers: int, folder: Path) -> tuple[Topology, Path]:
    """And the file that it is in."""
    folder.mkdir(parents=True)
    secret, file = folder / "secret", folder / "topology.yaml"
    secret.write_text(secrets.token_hex(16) + "\n")
    bootstrap_port, router_port = free_ports(2)
    topology = Topology(
        model=Model(path=DEMO_MODEL),
        bootstrap=Bootstrap(port=bootstrap_port),
        router=Router(port=router_port),
        prefill=Prefill(replicas=workers // 2),
        decode=Decode(replicas=workers - workers // 2),
        security=Security(secret_file=str(secret)),
    )
    file.write_text(dump_topology(topology))
    return topology, file


async def measure(workers: int, seconds: float, losses: int, requests: int, folder: Path, say: Say) -> Measured:
    """Raises `LaunchError`."""
    async with control_plane(workers, folder / str(workers)) as plane:
        say(f"{workers} workers are there")
        shares, told = await _idle(plane, seconds)
        say(f"idle: {shares}, {told:.0f} messages/s to those that follow the roster")
        resident = {"bootstrap": plane.bootstrap.cost().resident_bytes, "router": plane.router.cost().resident_bytes}
        placed = await _placing(plane, requests)
        say(f"a request: {placed}")
        broken = await _losses(plane, Cut, losses)
        silent = await _losses(plane, Hush, losses)
        say(f"lost: {broken}; silent: {silent}")
        bootstrap_anew = await _anew(plane, plane.bootstrap)
        router_anew = await _anew(plane, plane.router)
        say(f"anew: {bootstrap_anew}; {router_anew}")
    return Measured(
        workers=workers,
        bootstrap_cpu=shares["bootstrap"],
        router_cpu=shares["router"],
        swarm_cpu=shares["swarm"],
        told_per_second=told,
        bootstrap_bytes=resident["bootstrap"],
        router_bytes=resident["router"],
        broken=broken,
        silent=silent,
        placed=placed,
        bootstrap_anew=bootstrap_anew,
        router_anew=router_anew,
    )


async def _idle(plane: Plane, seconds: float) -> tuple[dict[str, float], float]:
    """Shares of a core while all that happens is heartbeats, by process; messages a second that bootstrap tells."""
    told = await plane.swarm.ask(Count())
    before, begun = _spent(plane), time.monotonic()
    await asyncio.sleep(seconds)
    after, lasted = _spent(plane), time.monotonic() - begun
    told_after = await plane.swarm.ask(Count())
    shares = {name: (after[name] - before[name]) / lasted for name in after}
    return shares, (told_after.heard - told.heard) / lasted


async def _placing(plane: Plane, requests: int) -> Placed:
    """Requests one after the other for each of a few clients, less what heartbeats cost meanwhile: next to nothing."""
    numbers = iter(range(requests))

    async def client() -> None:
        for number in numbers:
            await plane.request(number)

    await plane.request(-1)
    chosen, before = await plane.placement_seconds(), plane.router.cost().cpu_seconds
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    after = plane.router.cost().cpu_seconds
    placement = (await plane.placement_seconds() - chosen) / requests
    return Placed(requests, (after - before) / requests, placement)


async def _losses(plane: Plane, kind: Callable[[int], Command], count: int) -> Losses:
    """Different workers, one after the other; each is back before the next one goes."""
    chosen = random.Random(count).sample(range(plane.swarm.workers), count)
    at_bootstrap, at_router = [], []
    for index in chosen:
        told = await plane.swarm.ask(kind(index))
        noticed: dict[str, float] = {}

        async def unseen(names: Callable[[], Awaitable[set[str]]], who: str, worker: str = told.name) -> None:
            async def gone() -> bool:
                return worker not in await names()

            await until(gone, f"{who} to notice that {worker} is lost")
            noticed[who] = time.time()  # noqa: B023 - read before the next turn

        await asyncio.gather(unseen(plane.members, "bootstrap"), unseen(plane.live, "router"))
        lost = plane.router.logged_at("worker lost", told.name, told.at)
        at_bootstrap.append(noticed["bootstrap"] - told.at)
        at_router.append((lost or noticed["router"]) - told.at)
        await plane.swarm.ask(Revive(index))
        await plane.complete()
    return Losses(Repeated.over(at_bootstrap), Repeated.over(at_router))


async def _anew(plane: Plane, server: ServerProcess) -> Recovered:
    """Kills one of the two and starts it again."""
    server.kill()
    before, begun = _spent(plane, without=server), time.monotonic()
    server.start()
    await plane.complete()
    seconds, after = time.monotonic() - begun, _spent(plane)
    await asyncio.sleep(SETTLE_SECONDS)
    spent = {name: after[name] - before[name] for name in ("bootstrap", "router")}
    return Recovered(seconds, spent["bootstrap"], spent["router"])


def _spent(plane: Plane, without: ServerProcess | None = None) -> dict[str, float]:
    """CPU seconds of each process so far; 0 for one that is not there."""
    servers = {"bootstrap": plane.bootstrap, "router": plane.router}
    found = {name: 0.0 if server is without else server.cost().cpu_seconds for name, server in servers.items()}
    return found | {"swarm": plane.swarm.cpu_seconds()}


async def until(condition: Callable[[], Awaitable[bool]], what: str, poll_seconds: float = POLL_SECONDS) -> None:
    """Raises `LaunchError` if it takes too long."""
    deadline = time.monotonic() + READY_SECONDS
    while not await condition():
        if time.monotonic() > deadline:
            raise LaunchError(f"not within {READY_SECONDS:g} s: {what}")
        await asyncio.sleep(poll_seconds)

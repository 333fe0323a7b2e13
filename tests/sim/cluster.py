"""One simulated cluster: bootstrap, a router, workers of both pools, network and clients; and what must hold of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random
from typing import Any

from aiohttp import web

from bootstrap.server import BootstrapServer
from cluster.config import (
    KV,
    Bootstrap,
    BreakEven,
    Decode,
    DecodeScheduling,
    Dtype,
    Model,
    Prefill,
    Router,
    Security,
    Switch,
    Topology,
)
from cluster.engine_messages import FromPeer
from cluster.messages import AttemptFailed, AttemptFinished, AttemptStarted, Message, Role, Sampling, Tokens
from router.request_state import WorkerKey
from tests.sim.engines import EngineLife
from tests.sim.faults import CROWDED, POOLS
from tests.sim.kernel import SimLoop, Strand, Violation
from tests.sim.model import PAGE_SIZE, VOCABULARY
from tests.sim.network import Network, SimLink
from tests.sim.platform import handlers_of, serve_application
from tests.sim.router import Client, SimRouter
from tests.sim.story import Story
from tests.sim.transfer import SimFabric
from tests.sim.workers import SimWorker

FOR_DISPATCHER = (AttemptStarted, Tokens, AttemptFinished, AttemptFailed)
START_SECONDS = 3.0
"""Until all workers have loaded and know each other."""
ROUTER_RESTART_SECONDS = (0.3, 1.5)
LEAST_POOL = 15
"""In pages: the longest prompt and all that may follow it fit."""
STOP_TOKEN = VOCABULARY - 1


@dataclass(frozen=True)
class Shape:
    """What a cluster is made of, and what its clients want."""

    prefill: int
    decode: int
    pool_pages: int
    requests: int
    spread_seconds: float
    """Requests arrive within so long."""
    retract_every_steps: int
    one_machine: bool
    """All workers on one host: each can ask its kernel whether another one is dead."""
    break_even: bool
    """Short prompts are prefilled where they decode."""
    long_prompts: bool
    """Each of them takes most of a pool."""
    long_answers: bool
    """Each of them takes a while."""
    ahead: bool
    """Decode steps are launched before the one before them has been read."""

    @classmethod
    def of(cls, random: Random, place: str, *, ahead: bool) -> Shape:
        """`place` is where the first fault is to strike; it says what the cluster must be like to get there."""
        split = [(2, 2), (2, 2), (2, 2), (1, 1), (1, 2), (2, 1)]
        prefill, decode = POOLS.get(place) or random.choice(split)
        crowded = place in CROWDED
        return cls(
            prefill,
            decode,
            pool_pages=LEAST_POOL if crowded else random.choice([20, 28, 40]),
            requests=5 if crowded else random.randint(2, 4),
            spread_seconds=0.0 if crowded else random.choice([0.0, 0.3, 1.0]),
            retract_every_steps=random.choice([0, 0, 0, 9]),
            one_machine=random.random() < 0.5,
            break_even=not crowded and random.random() < 0.1,
            long_prompts=crowded,
            long_answers=place in POOLS,
            ahead=ahead,
        )

    def topology(self) -> Topology:
        return Topology(
            model=Model(path="sim", dtype=Dtype.FLOAT16),
            kv=KV(
                page_size=PAGE_SIZE,
                pool_tokens=self.pool_pages * PAGE_SIZE,
                write_timeout_seconds=4.0,
                max_quarantine_seconds=8.0,
            ),
            bootstrap=Bootstrap(host="bootstrap"),
            router=Router(break_even=BreakEven(enabled=self.break_even)),
            prefill=Prefill(replicas=self.prefill, chunk_tokens=8, max_running=4),
            decode=Decode(
                replicas=self.decode,
                chunk_tokens=8,
                max_running=4,
                scheduling=DecodeScheduling(
                    ahead=Switch.ALWAYS if self.ahead else Switch.NEVER, retract_every_steps=self.retract_every_steps
                ),
            ),
            security=Security(allow_insecure=True),
        )


class SimBootstrap:
    """One life of bootstrap: the real server's handlers over simulated links."""

    def __init__(self, cluster: SimCluster) -> None:
        self.strand = Strand("bootstrap", "bootstrap")
        server = BootstrapServer(cluster.topology.bootstrap, cluster.loop)
        app = server.application()
        self._handlers = handlers_of(app)
        cluster.network.listen("bootstrap", self.strand, self._serve)
        cluster.loop.spawn(self.strand, self._tick(app))

    async def _serve(self, path: str, link: SimLink) -> None:
        await serve_application(path, link, self._handlers)

    async def _tick(self, app: web.Application) -> None:
        """What the application does beside its requests, for as long as the process lives."""
        for context in app.cleanup_ctx:
            await context(app).__anext__()  # type: ignore[union-attr]
        await asyncio.Event().wait()


class SimCluster:
    """Everything, for one seed."""

    def __init__(self, seed: int, shape: Shape, metrics: Any, story: Story) -> None:
        self.random = Random(seed)
        self.shape = shape
        self.loop = SimLoop()
        self.loop.cluster = self
        self.topology = shape.topology()
        self.story = story
        story.clock = self.loop
        self.lives: list[EngineLife] = []
        self._metrics = metrics
        self._epoch = 0
        self._routers = 0
        self.network = Network(self.loop, self.random, self._heard)
        self.fabric = SimFabric(self.loop, self.random, self.network.reachable)
        self.workers: dict[str, SimWorker] = {}
        self.clients: list[Client] = []
        self.router: SimRouter
        self.bootstrap: SimBootstrap
        self.heard: list[tuple[SimLink, Message]] = []
        """Messages that were delivered: what a fault repeats."""

    def start(self) -> None:
        """Processes and clients; inside `SimLoop.installed`."""
        self.bootstrap = SimBootstrap(self)
        for role, count in ((Role.PREFILL, self.shape.prefill), (Role.DECODE, self.shape.decode)):
            for index in range(count):
                name = f"{role.value}-{index}"
                self.workers[name] = SimWorker(self, name, role)
        self._start_router()
        self.loop.run(self.loop.now() + START_SECONDS)
        for number in range(self.shape.requests):
            client = self._client(f"r{number}")
            self.clients.append(client)
            client.ask_in(self.random.uniform(0.0, self.shape.spread_seconds))

    def _client(self, name: str) -> Client:
        random = self.random
        crowd = self.shape.long_prompts
        shared = [token % 7 for token in range(0 if crowd else random.choice([0, 8, 17]))]
        own = random.randint(25, 31) if crowd else random.randint(1, 14)
        prompt = [*shared, *random.choices(range(VOCABULARY), k=own)]
        longest = random.choice([12, 24] if self.shape.long_answers else [1, 2, 6, 12, 24])
        stops = [STOP_TOKEN] if random.random() < 0.5 else []
        count = 2 if random.random() < 0.15 else 1
        samplings = [
            Sampling(max_tokens=longest, seed=random.getrandbits(32), stop_token_ids=stops) for _ in range(count)
        ]
        client = Client(self, name, prompt, samplings)
        for choice in client.choices:
            if random.random() < 0.15:
                choice.stop_after = random.randint(1, longest)
        return client

    # --- what others ask ----------------------------------------------------------------------------------------------

    def next_epoch(self) -> int:
        """Epochs grow with time, over all workers."""
        self._epoch += 1
        return self._epoch

    def machine_of(self, host: str) -> str:
        """The kernel that a process of this host asks."""
        return "one" if self.shape.one_machine else host

    def life(self, epoch: int) -> EngineLife:
        return self.lives[epoch - 1]

    def _heard(self, link: SimLink, message: Message) -> None:
        self.story.message(link, message)
        between_workers = link.host in self.workers and link.other.host in self.workers
        if between_workers or isinstance(message, FOR_DISPATCHER):
            self.heard.append((link, message))

    def repeat(self, link: SimLink, message: Any) -> None:
        """A message comes once more, perhaps much later, over whatever connects the two now."""
        sender = self.workers[link.other.host].life
        if sender is None:
            return
        self.story.note(f"{type(message).__name__} from {sender.name} to {link.host} comes once more")
        if link.host == "router":
            key = WorkerKey(sender.name, sender.epoch)
            self.loop.at(0.0, self.router.strand, self.router.dispatcher.receive, key, message)
            return
        receiver = self.workers[link.host].life
        if receiver is not None and receiver.alive:
            receiver.channel.post(FromPeer(sender.name, sender.epoch, message))

    # --- the router's lives -------------------------------------------------------------------------------------------

    def _start_router(self) -> None:
        self._routers += 1
        unified = self.shape.prefill == 0
        self.router = SimRouter(self, f"router-{self._routers}", self._metrics, unified=unified)

    def kill_router(self) -> None:
        if not self.router.strand.alive:
            return
        self.router.kill()
        self.loop.at(self.random.uniform(*ROUTER_RESTART_SECONDS), None, self._start_router)
        for client in self.clients:
            if client.connections and not client.ended:
                client.ask_in(self.random.uniform(0.01, 0.2))

    def kill_bootstrap(self) -> None:
        if not self.bootstrap.strand.alive:
            return
        self.bootstrap.strand.alive = False
        self.network.process_died("bootstrap", self.bootstrap.strand)
        self.loop.at(self.random.uniform(0.5, 3.0), None, self._start_bootstrap)

    def _start_bootstrap(self) -> None:
        self.bootstrap = SimBootstrap(self)

    # --- invariants ---------------------------------------------------------------------------------------------------

    def unsettled(self) -> list[str]:
        """What is not at rest yet, in words; empty when every request has ended and everything is given back."""
        open_things = [f"client {client.name} waits" for client in self.clients if not client.ended]
        if not self.router.strand.alive:
            return [*open_things, "the router is down"]
        if self.router.dispatcher.in_flight:
            open_things.append(f"the router has {self.router.dispatcher.in_flight} choices in flight")
        for worker in self.workers.values():
            open_things += self._unsettled_at(worker)
        for status in self.router.fleet.statuses():
            if not status.live:
                open_things.append(f"the router gives {status.worker}@{status.epoch} no work")
        return open_things

    def _unsettled_at(self, worker: SimWorker) -> list[str]:
        life = worker.life
        if life is None or not worker.up:
            return [f"{worker.name} is down"]
        load = life.handler.load()
        left = [f"{kind} {pages}" for kind, pages in life.engine.owners().items() if pages]
        if load.queued or load.running or load.transfers:
            left.append(f"queued {load.queued}, running {load.running}, transfers {load.transfers}")
        if life.stepping.holds or life.transfers.holds or worker.strand.holds:
            left.append("been stopped")
        return [f"{worker.name} has {', '.join(left)}"] if left else []

    def require_rest(self) -> None:
        """Everything has ended: ledgers balance, and nobody remembers what is over."""
        errors = list(self.router.fleet.integrity_errors())
        errors += [
            f"{status.worker} has {status.attempts} attempts in the router's view"
            for status in self.router.fleet.statuses()
            if status.attempts
        ]
        for worker in self.workers.values():
            if worker.life is not None:
                worker.life.engine.require_sound()
        if errors:
            raise Violation("; ".join(errors))

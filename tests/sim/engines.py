"""Simulated engine processes: the real step loop, sender and receiver over the simulated model and transfer engine.

An `EngineLife` is one engine process, from its start to its death, with an epoch of its own. Its step loop runs on one
strand and its transfer thread on another; both are stopped and killed together.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.engine_main import EngineContext
from cluster.engine_messages import EngineFailed
from cluster.errors import BatonError, IllegalTransition, WorkerLost, from_info
from cluster.messages import Message, ProcessIdentity, Role
from cluster.progress_board import Progress
from cluster.step_loop import StepLoop
from decode_worker import engine_process as decode_process
from engine.engine import EngineConfig
from engine.pages import LedgerBroken
from kv_transfer.backends.base import PoolMemory
from prefill_worker import engine_process as prefill_process
from tests.sim.kernel import Killed, Strand, Timer
from tests.sim.model import SimEngine
from tests.sim.transfer import SimBackend, SimTransferThread

if TYPE_CHECKING:
    from tests.sim.cluster import SimCluster

PIPE_SECONDS = 0.0001
"""A message between a worker's two processes takes so long."""
DEATH_SECONDS = 0.01
"""A parent notices its child's death within so long."""
DEFECTS = (IllegalTransition, LedgerBroken)
"""An engine process that ends itself by one of these has found a bug of ours."""


class SimChannel:
    """The engine process's end of the channel to its control process; interface of `cluster.ipc.EngineChannel`."""

    def __init__(self, life: EngineLife) -> None:
        self._life = life
        self._inbox: list[Message] = []
        self._looks_up: Timer | None = None
        self._due = False
        self.idle = False
        """The last turn did nothing."""

    # --- the step loop's side -----------------------------------------------------------------------------------------

    def receive(self) -> list[Message]:
        self._due = False
        messages, self._inbox = self._inbox, []
        self.idle = not messages
        return messages

    def receive_only(self, kinds: tuple[type[Message], ...]) -> list[Any]:
        wanted = [message for message in self._inbox if isinstance(message, kinds)]
        if wanted:
            self._inbox = [message for message in self._inbox if not isinstance(message, kinds)]
        return wanted

    def send(self, message: Message) -> None:
        life = self._life
        life.cluster.loop.at(PIPE_SECONDS, life.host.strand, life.host.take, message)

    def flush(self) -> None:
        """There is more to do at once."""
        self.idle = False
        self.wake()

    def wait(self, seconds: float) -> None:
        """Nothing to do until something comes, or the time is over."""
        if self._inbox:
            self.wake()
        else:
            self._looks_up = self._life.cluster.loop.at(seconds, self._life.stepping, self.wake)

    # --- others -------------------------------------------------------------------------------------------------------

    def post(self, message: Message) -> None:
        """From the control process."""
        self._inbox.append(message)
        self.wake()

    def wake(self) -> None:
        """Also from the transfer thread."""
        if self._looks_up is not None:
            self._looks_up.cancel()
            self._looks_up = None
        if not self._due:
            self._due = True
            self._life.cluster.loop.at(0.0, self._life.stepping, self._life.turn)


class SimBoard:
    """A `cluster.progress_board.ProgressBoard` without shared memory."""

    def __init__(self) -> None:
        self._engine = 0
        self._transfers = 0
        self._step_began: float | None = None
        self._oldest_transfer: float | None = None

    def advance(self) -> None:
        self._engine += 1

    def step_begins(self, now: float) -> None:
        self._step_began = now

    def step_ends(self) -> None:
        self._step_began = None

    def transfers_seen(self, oldest: float | None) -> None:
        self._transfers += 1
        self._oldest_transfer = oldest

    def read(self) -> Progress:
        return Progress(self._engine, self._transfers, self._step_began, self._oldest_transfer)

    def close(self) -> None:
        """There is nothing to unmap."""


class EngineLife:
    """One engine process, made by its role's own `build`, which finds these methods in place of its parts. `host` is
    its parent's view of it."""

    def __init__(self, host: SimEngineHost, cluster: SimCluster, name: str, role: Role) -> None:
        self.host = host
        self.cluster = cluster
        self.name = name
        self.epoch = cluster.next_epoch()
        agent = f"{name}@{self.epoch}"
        self.stepping = Strand(f"{agent} step loop", name)
        self.transfers = Strand(f"{agent} transfers", name)
        self.board = SimBoard()
        self.channel = SimChannel(self)
        self.engine: SimEngine
        self.backend: SimBackend
        context: Any = EngineContext(
            cluster.topology, name, name, self.epoch, [0], self.channel, self.board, cluster.loop
        )  # type: ignore[arg-type]
        build = prefill_process.build if role is Role.PREFILL else decode_process.build
        cluster.lives.append(self)
        with cluster.loop.running(self.stepping):
            self.handler, ready = build(context)
        self._loop = StepLoop(self.handler, self.channel, cluster.loop, self.board)  # type: ignore[arg-type]
        self.channel.send(ready)
        self.channel.wake()

    # --- what `build` asks for ----------------------------------------------------------------------------------------

    def make_engine(self, config: EngineConfig, on_layer: Callable[[], None]) -> SimEngine:
        self.engine = SimEngine(config, self._work, on_layer)
        return self.engine

    def open_backend(self, pool: PoolMemory) -> SimBackend:
        self.backend = SimBackend(self.cluster.fabric, self.name, self.epoch, pool, self.engine, self.transfers)
        return self.backend

    def start_transfers(self, *parts: Any) -> SimTransferThread:
        return SimTransferThread(self.cluster.loop, self.stepping, *parts)

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.cluster.machine_of(self.name), "namespace", self.epoch, 1)

    # --- its life -----------------------------------------------------------------------------------------------------

    @property
    def strands(self) -> tuple[Strand, Strand]:
        return self.stepping, self.transfers

    @property
    def alive(self) -> bool:
        return self.stepping.alive

    def turn(self) -> None:
        """One turn of the step loop."""
        try:
            if not self._loop._turn():
                self.handler.close()
                self.die()
        except Killed:
            return
        except BatonError as error:
            if isinstance(error, DEFECTS):
                raise
            self.channel.send(EngineFailed(error.to_info()))
            self.die()
        else:
            if not self.channel.idle:
                self.engine.require_sound()

    def _work(self, tokens: int, between_layers: Callable[[], None]) -> None:
        """The middle of a step."""
        seconds = self.cluster.random.uniform(0.004, 0.012) + 0.001 * tokens
        for _ in range(2):
            self.cluster.loop.spend(self.stepping, seconds / 2)
            between_layers()

    def die(self) -> None:
        """At once, whatever it was doing; its parent will notice."""
        if not self.alive:
            return
        self.cluster.story.note(f"{self.name}@{self.epoch}: the engine process is dead")
        for strand in self.strands:
            strand.alive = False
        self.cluster.fabric.left(self.backend)
        self.cluster.loop.at(DEATH_SECONDS, self.host.strand, self.host.notice_death)


class SimEngineHost:
    """The control process's view of its engine process; interface of `cluster.engine_host.EngineHost`."""

    def __init__(self, strand: Strand, start: Callable[[SimEngineHost], EngineLife], loading: float) -> None:
        self.strand = strand
        self._start = start
        self._loading = loading
        self._life: EngineLife | None = None
        self._dead = asyncio.Event()
        self._news = asyncio.Event()
        self._messages: list[Message] = []

    @property
    def board(self) -> SimBoard:
        assert self._life is not None
        return self._life.board

    async def ready(self) -> Message:
        await asyncio.sleep(self._loading)
        self._life = self._start(self)
        return (await self.receive(1))[0]

    def post(self, message: Message) -> None:
        if self._life is not None and self._life.alive:
            self._life.cluster.loop.at(PIPE_SECONDS, self._life.stepping, self._life.channel.post, message)

    async def receive(self, most: int | None = None) -> list[Message]:
        while not self._messages:
            if self._dead.is_set():
                raise WorkerLost("the engine process died (signal SIGKILL)")
            self._news.clear()
            await self._news.wait()
        taken, self._messages = self._messages[:most], self._messages[len(self._messages) if most is None else most :]
        for message in taken:
            if isinstance(message, EngineFailed):
                raise from_info(message.error)
        return taken

    def kill(self) -> None:
        if self._life is not None:
            self._life.die()

    async def close(self) -> None:
        """See `EngineHost.close`: when it returns, the process is dead."""
        self.kill()
        if self._life is not None:
            await self._dead.wait()

    # --- the engine process's side ------------------------------------------------------------------------------------

    def take(self, message: Message) -> None:
        self._messages.append(message)
        self._news.set()

    def notice_death(self) -> None:
        self._dead.set()
        self._news.set()

"""A prefill and a decode worker's step loops in one thread: a tiny real engine each, an in-memory transfer engine.

Messages move only in `turn`; nothing waits for time. `router` collects what the loops say to the router, per fence.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
import pytest

from cluster.clock import ManualClock
from cluster.config import Dtype, Switch, WeightsFrom
from cluster.engine_messages import FromPeer, FromRouter, PeerDown, PeerUp, ToRouter
from cluster.messages import (
    AttemptFailed,
    AttemptFinished,
    CancelAttempt,
    DecodeAttempt,
    EngineRank,
    Fence,
    Message,
    PeerHello,
    PrefillAttempt,
    ProcessIdentity,
    Role,
    Sampling,
    Tokens,
)
from decode_worker.decode_loop import DecodeLoop
from decode_worker.quarantine_state import QuarantineWatch
from engine.engine import Engine, EngineConfig
from engine.kv_cache import KVCache
from kv_transfer.backends.base import PoolMemory
from kv_transfer.backends.memory import MemoryBackend, MemoryFabric
from kv_transfer.digests import PageDigests
from kv_transfer.driver import TransferDriver
from kv_transfer.receiver import HandoffReceiver
from kv_transfer.sender import HandoffSender
from prefill_worker.prefill_loop import PrefillLoop
from tests.unit.kv_transfer.world import FollowerPort, InlinePort

PREFILL_EPOCH, DECODE_EPOCH = 100, 200
QUARANTINE_SECONDS, DRAIN_SECONDS = 30.0, 60.0
ROUTER = "router"
GREEDY = Sampling(max_tokens=6, seed=1, temperature=0.0)
ENGINES = {
    "prefix-cache": ({}, {}),
    "no-cache": ({"prefix_cache": False}, {"prefix_cache": False}),
    "ahead": ({}, {"ahead": Switch.ALWAYS}),
}
"""What is peculiar about prefill's engine, and about decode's."""
STAGES = "stages"
"""Both workers have two; several steps are under way. For tests that don't count on what comes with which step."""
WITH_STAGES = pytest.mark.parametrize("pair", [*ENGINES, STAGES], indirect=True)
TINY_LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def tiny_engine(
    folder: Path,
    *,
    pool_pages: int = 64,
    max_running: int = 16,
    chunk_tokens: int = 16,
    prefix_cache: bool = True,
    **scheduling,
) -> Engine:
    """Random weights, the same in each engine; pages of 4 tokens."""
    return Engine(
        tiny_config(
            folder,
            pool_pages=pool_pages,
            max_running=max_running,
            chunk_tokens=chunk_tokens,
            prefix_cache=prefix_cache,
            **scheduling,
        )
    )


def tiny_config(folder: Path, **settings) -> EngineConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return EngineConfig(
        model_path=folder, model_name="tiny", dtype=Dtype.FLOAT32, weights=WeightsFrom.DUMMY, page_size=4, **settings
    )


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(128), k=length)


class Pair:
    """Both loops, connected. `dead` holds the pids of processes that count as dead. `pools`: of the other ranks of the
    two workers."""

    def __init__(
        self,
        prefill_engine: Engine,
        decode_engine: Engine,
        pools: Mapping[str, Sequence[KVCache]] = MappingProxyType({}),
    ) -> None:
        self.clock = ManualClock(1000.0)
        self.fabric = MemoryFabric()
        self.dead: set[int] = set()
        self.closed: list[str] = []
        self.between_layers = lambda: None
        self.between_decodes_layers = lambda: None
        self.to_prefill: deque[Message] = deque()
        self.to_decode: deque[Message] = deque()
        self.router: dict[Fence, list[Message]] = defaultdict(list)
        self.engines = {"prefill": prefill_engine, "decode": decode_engine}
        self.ranks: dict[str, list[EngineRank]] = defaultdict(list)
        self.ports = {
            name: self._port(
                name, PoolMemory(engine.pool_address, engine.pool_bytes // engine.page_bytes, engine.page_bytes)
            )
            for name, engine in self.engines.items()
        }
        self.followers = {
            name: [
                FollowerPort(self._port(name, PoolMemory(pool.address, pool.pages, pool.page_bytes)), first)
                for pool in pools.get(name, ())
            ]
            for name, first in self.ports.items()
        }
        self.sender = HandoffSender(
            self.ports["prefill"], prefill_engine.layout, self._peer_wire(self.to_decode, "prefill", PREFILL_EPOCH),
            self.clock, True, epoch=PREFILL_EPOCH, followers=self.followers["prefill"],
        )  # fmt: skip
        self.receiver = HandoffReceiver(
            self.ports["decode"], decode_engine.layout, self._peer_wire(self.to_prefill, "decode", DECODE_EPOCH),
            self.clock, True, epoch=DECODE_EPOCH, is_dead=lambda process: process.pid in self.dead,
            followers=self.followers["decode"],
        )  # fmt: skip
        self.prefill = PrefillLoop(
            prefill_engine,
            self.sender,
            self._hear,
            self._in_mid_step,
            self.clock,
            PREFILL_EPOCH,
            lambda: self.closed.append("prefill"),
        )
        self.decode = DecodeLoop(
            decode_engine,
            self.receiver,
            self._hear,
            self._in_decodes_step,
            self.clock,
            DECODE_EPOCH,
            lambda: self.closed.append("decode"),
            QuarantineWatch(decode_engine.ledger.total, 0.5, QUARANTINE_SECONDS, DRAIN_SECONDS),
        )
        self.connect()

    def _port(self, name: str, pool: PoolMemory) -> InlinePort:
        """Of the worker's next rank."""
        ranks, epoch = self.ranks[name], PREFILL_EPOCH if name == "prefill" else DECODE_EPOCH
        backend = MemoryBackend(self.fabric, f"{name}-{len(ranks)}", pool)
        ranks.append(EngineRank(backend.descriptor, ProcessIdentity("boot", "namespace", epoch + len(ranks), 1)))
        return InlinePort(TransferDriver(backend, PageDigests(pool), self.clock))

    def _peer_wire(self, wire, worker, epoch):
        return lambda to, to_epoch, message: wire.append(FromPeer(worker, epoch, message))

    def _in_mid_step(self, kinds) -> list:
        """What prefill's channel has between two layers; `between_layers` is where a test lets decode go on."""
        self.between_layers()
        return _taken(self.to_prefill, kinds)

    def _in_decodes_step(self, kinds) -> list:
        """The same of decode; `between_decodes_layers` is where a test lets prefill go on."""
        self.between_decodes_layers()
        return _taken(self.to_decode, kinds)

    def _hear(self, message: Message) -> None:
        """What a loop sends to its control process."""
        assert isinstance(message, ToRouter)
        said = message.message
        if isinstance(said, Tokens):
            for emitted in said.tokens:
                self.router[emitted.fence].append(emitted)
        else:
            self.router[said.fence].append(said)

    # --- the world outside -------------------------------------------------------------------------------------------

    def connect(self) -> None:
        for role, epoch, wire in (
            (Role.DECODE, DECODE_EPOCH, self.to_prefill),
            (Role.PREFILL, PREFILL_EPOCH, self.to_decode),
        ):
            layout, (first, *others) = self.engines[role.value].layout, self.ranks[role.value]
            hello = PeerHello(role.value, role, epoch, layout, "memory", first.descriptor, first.process)
            wire.append(PeerUp(msgspec.structs.replace(hello, followers=others)))

    def disconnect(self) -> None:
        """What the peers have on the wire is lost."""
        for wire in (self.to_prefill, self.to_decode):
            kept = [message for message in wire if not isinstance(message, FromPeer)]
            wire.clear()
            wire.extend(kept)
        self.to_prefill.append(PeerDown("decode", DECODE_EPOCH))
        self.to_decode.append(PeerDown("prefill", PREFILL_EPOCH))

    def request(
        self,
        name: str,
        prompt: list[int],
        sampling: Sampling,
        *,
        legs: str = "prefill decode",
        received_at: float | None = None,
    ) -> Fence:
        """Sends a request's attempts. legs "decode" alone: unified; "prefill" alone: one token."""
        fence = Fence(
            name, 1, PREFILL_EPOCH if "prefill" in legs else 0, DECODE_EPOCH if "decode" in legs else 0
        )  # fmt: skip
        if "prefill" in legs:
            decode = "decode" if "decode" in legs else None
            self.to_prefill.append(FromRouter(ROUTER, PrefillAttempt(fence, prompt, sampling, decode), received_at))
        if "decode" in legs:
            prefill = "prefill" if "prefill" in legs else None
            self.to_decode.append(FromRouter(ROUTER, DecodeAttempt(fence, prompt, sampling, prefill), received_at))
        return fence

    def cancel(self, fence: Fence) -> None:
        for wire in (self.to_prefill, self.to_decode):
            wire.append(FromRouter(ROUTER, CancelAttempt(fence, "test")))

    # --- time --------------------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """One turn of everything; whether anything happened."""
        self.clock.advance(0.01)
        happened = bool(self.to_prefill or self.to_decode)
        for worker in ("prefill", "decode"):
            happened |= self._loop_turn(worker)
        for worker in ("prefill", "decode"):
            happened |= self._port_turn(worker)
        return happened

    def turn_of(self, worker: str) -> None:
        """One turn of one worker alone."""
        self.clock.advance(0.01)
        self._loop_turn(worker)
        self._port_turn(worker)

    def _loop_turn(self, worker: str) -> bool:
        wire, loop = (self.to_prefill, self.prefill) if worker == "prefill" else (self.to_decode, self.decode)
        for _ in range(len(wire)):
            loop.handle(wire.popleft(), self.clock.now())
        return loop.step(self.clock.now())

    def _port_turn(self, worker: str) -> bool:
        happened = bool(self.ports[worker].commands)
        for port in (self.ports[worker], *self.followers[worker]):
            port.run(turns=10)
        return happened

    def settle(self, turns: int = 5000) -> None:
        """Turns until nothing happens any more, not even in the transfer engine, which may take a while to settle."""
        quiet = 0
        for _ in range(turns):
            quiet = 0 if self.turn() else quiet + 1
            if quiet == 10:
                return
        raise AssertionError(f"still busy after {turns} turns")

    # --- what came of it ---------------------------------------------------------------------------------------------

    def tokens(self, fence: Fence) -> list[int]:
        """The request's tokens in the order of their offsets; each exactly once."""
        emitted = sorted((m.offset, m.token) for m in self.router[fence] if hasattr(m, "offset"))
        assert [offset for offset, _ in emitted] == list(range(len(emitted))), emitted
        return [token for _, token in emitted]

    def ends(self, fence: Fence) -> dict[Role, AttemptFinished | AttemptFailed]:
        """Each leg's last word; a leg has at most one."""
        words = [m for m in self.router[fence] if isinstance(m, (AttemptFinished, AttemptFailed))]
        ends = {word.role: word for word in words}
        assert len(ends) == len(words), words
        return ends

    def assert_nothing_left(self) -> None:
        for engine in self.engines.values():
            engine.ledger.check()
            engine.prefixes.check()
            assert engine.pages_used == sum(engine.owners().values()) == 0, engine.owners()
        assert self.sender.active == self.receiver.active == 0
        for loop in (self.prefill, self.decode):
            load = loop.load()
            assert (load.queued, load.running, load.transfers, load.pages_quarantined) == (0, 0, 0, 0), load


def _taken(wire: deque[Message], kinds) -> list:
    wanted = [message for message in wire if isinstance(message, kinds)]
    for message in wanted:
        wire.remove(message)
    return wanted

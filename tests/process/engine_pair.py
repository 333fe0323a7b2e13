"""The engine processes of a prefill and a decode worker, several ranks each, over a tiny model; the test is their
control processes and their router, and all it does is to relay."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cluster.config import KV, Decode, Dtype, Model, Prefill, Topology, TransferName, WeightsFrom
from cluster.engine_host import EngineHost
from cluster.engine_messages import EngineReady, FromPeer, FromRouter, PeerUp, ToPeer, ToRouter
from cluster.errors import BatonError
from cluster.messages import (
    AttemptFailed,
    AttemptFinished,
    DecodeAttempt,
    Fence,
    PeerHello,
    PrefillAttempt,
    Role,
    Sampling,
    Tokens,
)
from cluster.shards import Grid
from cluster.topology import dump_topology
from engine.engine import Engine, EngineConfig
from engine.environment import engine_environment
from engine.sequence import Sequence as EngineSequence
from kv_transfer.backends import backend_environment
from tests.process.conditions import NETWORK

VOCABULARY = 128
TINY = {
    "model_type": "llama", "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16, "vocab_size": VOCABULARY,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True,
}  # fmt: skip
"""As the demo model, nine query heads read three key/value heads."""
CHUNK_TOKENS = 32
GREEDY = Sampling(max_tokens=12, seed=1, temperature=0.0)
SAMPLED = Sampling(max_tokens=12, seed=9, temperature=0.9)


def topology_of(folder: Path, transfer: str, prefill: Grid, decode: Grid) -> Topology:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY))
    return Topology(
        model=Model(path=str(folder), dtype=Dtype.FLOAT32, weights=WeightsFrom.DUMMY),
        kv=KV(page_size=4, pool_tokens=1024, transfer=TransferName(transfer), network=NETWORK),
        prefill=Prefill(**_divided(prefill), chunk_tokens=CHUNK_TOKENS, max_running=4),
        decode=Decode(**_divided(decode), chunk_tokens=CHUNK_TOKENS, max_running=4),
    )


def _divided(grid: Grid) -> dict[str, int]:
    return {"tensor_parallel": grid.shards, "pipeline_parallel": grid.stages}


def prompts(count: int) -> list[list[int]]:
    draw = random.Random(5)
    return [draw.choices(range(VOCABULARY), k=7 + 31 * number) for number in range(count)]


def expected_tokens(topology: Topology, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """By one process that has all of the model."""
    whole = msgspec.structs.replace(topology.decode, tensor_parallel=1, pipeline_parallel=1)
    engine = Engine(EngineConfig.from_topology(topology, whole, threads=1))
    engine.submit(EngineSequence(Fence("alone", 1, 0, 0), list(prompt), [], sampling))
    tokens: list[int] = []
    while result := engine.step():
        tokens += [sampled.token for sampled in result.sampled]
    return tokens


async def expect_tokens_of_one(topology: Topology, directory: Path, seconds: float) -> None:
    """Prompts of one chunk to four, handed over side by side, have the tokens of one process that has all."""
    pair = await EnginePair.start(directory, topology)
    try:
        asked = {f"r{number}": prompt for number, prompt in enumerate(prompts(4))}
        samplings = {request: SAMPLED if request == "r3" else GREEDY for request in asked}
        for request, prompt in asked.items():
            pair.ask(request, prompt, samplings[request])
        for request, prompt in asked.items():
            assert await pair.answer(request, seconds) == expected_tokens(topology, prompt, samplings[request])
        ended = pair.ended["r3", Role.PREFILL]
        assert isinstance(ended, AttemptFinished) and ended.handoff is not None
        assert ended.handoff.bytes == ended.handoff.pages * pair.ready[Role.PREFILL].layout.page_bytes
    finally:
        await pair.close()


class EnginePair:
    """Made by `start`; `close` in any case."""

    def __init__(self, hosts: dict[Role, EngineHost], ready: dict[Role, EngineReady]) -> None:
        self.hosts = hosts
        self.ready = ready
        self.tokens: dict[str, dict[int, int]] = {}
        """Of each request, by offset."""
        self.ended: dict[tuple[str, Role], AttemptFinished | AttemptFailed] = {}
        self._changed = asyncio.Event()
        self._relaying = [asyncio.create_task(self._relay(role)) for role in Role]

    @classmethod
    async def start(cls, directory: Path, topology: Topology) -> EnginePair:
        file = directory / "t.yaml"
        file.write_text(dump_topology(topology))
        environment = engine_environment() | backend_environment(topology.kv.transfer)
        hosts = {}
        for role, pool in ((Role.PREFILL, topology.prefill), (Role.DECODE, topology.decode)):
            arguments = ["--topology", str(file), "--index", "0", "--name", role.value, "--host", "127.0.0.1"]
            module = f"{role.value}_worker.engine_process"
            hosts[role] = await EngineHost.start(module, arguments, environment, pool.grid.ranks)
        try:
            ready = dict(zip(hosts, await asyncio.gather(*(host.ready() for host in hosts.values())), strict=True))
        except BatonError:
            await asyncio.gather(*(host.close() for host in hosts.values()))
            raise
        pair = cls(hosts, ready)
        for role, other in ((Role.PREFILL, Role.DECODE), (Role.DECODE, Role.PREFILL)):
            hosts[role].post(PeerUp(pair._hello(other, topology)))
        return pair

    def ask(self, request: str, prompt: list[int], sampling: Sampling) -> None:
        fence = Fence(request, 1, self.ready[Role.PREFILL].epoch, self.ready[Role.DECODE].epoch)
        prefill = PrefillAttempt(fence, prompt, sampling, Role.DECODE.value)
        self.hosts[Role.PREFILL].post(FromRouter("test", prefill))
        self.hosts[Role.DECODE].post(FromRouter("test", DecodeAttempt(fence, prompt, sampling, Role.PREFILL.value)))

    async def answer(self, request: str, seconds: float) -> list[int]:
        """All tokens, when both legs have ended well."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not all((request, role) in self.ended for role in Role):
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), deadline - asyncio.get_running_loop().time())
        for role in Role:
            assert isinstance(self.ended[request, role], AttemptFinished), self.ended[request, role]
        tokens = self.tokens[request]
        return [tokens[offset] for offset in range(len(tokens))]

    async def close(self) -> None:
        for task in self._relaying:
            task.cancel()
        await asyncio.gather(*self._relaying, return_exceptions=True)
        await asyncio.gather(*(host.close() for host in self.hosts.values()))

    def _hello(self, role: Role, topology: Topology) -> PeerHello:
        ready = self.ready[role]
        return PeerHello(
            worker=role.value,
            role=role,
            epoch=ready.epoch,
            layout=ready.layout,
            transfer=topology.kv.transfer.value,
            descriptor=ready.descriptor,
            engine=ready.process,
            followers=ready.followers,
        )

    async def _relay(self, role: Role) -> None:
        while True:
            for message in await self.hosts[role].receive():
                if isinstance(message, ToPeer):
                    other = self.hosts[Role(message.worker)]
                    other.post(FromPeer(role.value, self.ready[role].epoch, message.message))
                elif isinstance(message, ToRouter):
                    self._heard(message)

    def _heard(self, envelope: ToRouter) -> None:
        message = envelope.message
        if isinstance(message, Tokens):
            for emitted in message.tokens:
                self.tokens.setdefault(emitted.fence.request, {})[emitted.offset] = emitted.token
        elif isinstance(message, AttemptFinished | AttemptFailed):
            role = message.role
            self.ended[message.fence.request, role] = message
        self._changed.set()

"""`python -m bench.control_plane.swarm_process TOPOLOGY WORKERS`: simulated workers, until standard input ends."""

from __future__ import annotations

import asyncio
import sys
import time

import msgspec
import uvloop

from bench.control_plane.swarm import Command, Count, Cut, Hush, Told
from bench.control_plane.worker import SimulatedWorker
from cluster.access.security import ClusterSecurity
from cluster.config import Topology
from cluster.logging import configure
from cluster.messages import ModelCard
from cluster.process import allow_open_files, die_with_parent, forget_garbage
from cluster.topology import load_topology

FILES_PER_WORKER = 8
"""Its port, and its ends of the links: to bootstrap, as member and as watcher, and of some routers."""
OTHER_FILES = 256
CONTEXT_LENGTH = 8192
VOCABULARY = 49152
"""Of the demo model, whose tokenizer the router loads."""


async def main(topology: Topology, count: int) -> None:
    allow_open_files(count * FILES_PER_WORKER + OTHER_FILES)
    card = ModelCard(topology.served_model, CONTEXT_LENGTH, VOCABULARY)
    security = ClusterSecurity(topology.security)
    commands = await _standard_input()
    async with security.session() as session:
        workers = [SimulatedWorker(index, topology, session, security) for index in range(count)]
        for worker in workers:
            await worker.start(card)
        forget_garbage()
        while line := await commands.readline():
            told = await _carry_out(msgspec.json.decode(line, type=Command), workers, card)
            print(msgspec.json.encode(told).decode(), flush=True)


async def _carry_out(command: Command, workers: list[SimulatedWorker], card: ModelCard) -> Told:
    if isinstance(command, Count):
        registrations = sum(worker.registered for worker in workers)
        return Told(time.time(), "", registrations, sum(worker.heard for worker in workers))
    worker, at = workers[command.index], time.time()
    if isinstance(command, Cut):
        await worker.cut()
    elif isinstance(command, Hush):
        worker.hush()
    else:
        await worker.start(card)
    return Told(at, worker.name)


async def _standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


if __name__ == "__main__":
    die_with_parent()
    found = load_topology(sys.argv[1])
    configure("swarm", found.logging)
    uvloop.run(main(found, int(sys.argv[2])))

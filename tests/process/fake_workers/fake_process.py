"""`FakeWorker`s as processes, which `baton up` takes for ours: a real bootstrap and a real router, and no model."""

import argparse
import asyncio
import time

import aiohttp

from cluster.messages import Load, Role
from cluster.stop_signals import StopSignals
from cluster.topology import load_topology
from tests.process.fake_worker import Behaviour, FakeWorker

TOKEN_SECONDS = 0.01
POLL_SECONDS = 0.01


def main(role: Role) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology", required=True)
    parser.add_argument("--index", required=True)
    arguments = parser.parse_args()
    bootstrap_url = load_topology(arguments.topology).bootstrap_url
    asyncio.run(serve(f"{role.value}-{arguments.index}", role, bootstrap_url))


async def serve(name: str, role: Role, bootstrap_url: str) -> None:
    """Until SIGTERM; then to the end of what it has begun."""
    async with aiohttp.ClientSession() as session:
        worker = FakeWorker(name, role, time.time_ns(), Behaviour(token_seconds=TOKEN_SECONDS))
        worker.load = Load(ready=True, pages_total=512)
        await worker.start(session, bootstrap_url)
        print("started", flush=True)
        with StopSignals() as signals:
            await signals.wait()
            await worker.leave()
            while worker.running:  # noqa: ASYNC110 - nothing tells of the last one
                await asyncio.sleep(POLL_SECONDS)
        await worker.close()

"""What a cluster costs that has nothing to do: the share of a core that each of its members uses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench.client import OPTIONS, CompletionClient, Timeline, open_session
from bench.cluster import Cluster
from bench.machine import Setting
from bench.processes import LAUNCHER
from bench.report import Page, Table, number
from bench.targets import Target, at_most, targets_table
from bench.workload import Prompts
from cluster.errors import LaunchError

MOST_PERCENT = 2.0
"""Of a core: what an idle worker, with its two processes and all of their threads, may use."""
REQUESTS = 8
PROMPT_TOKENS = 200
ANSWER_TOKENS = 20
SETTLE_SECONDS = 2.0
"""Between the last work and the look: connections, caches and allocators come to rest."""


class IdleCluster(msgspec.Struct, frozen=True):
    """Percent of a core, by member of a cluster that has served some requests and has nothing to do."""

    transfer: str
    percent: dict[str, float]


class IdleReport(msgspec.Struct, frozen=True):
    setting: Setting
    topology: str
    seconds: float
    clusters: list[IdleCluster]

    @property
    def targets(self) -> list[Target]:
        """Of the busiest member of each cluster."""
        return [
            at_most(f"busiest member, {found.transfer}, percent of a core", max(found.percent.values()), MOST_PERCENT)
            for found in self.clusters
        ]

    @property
    def page(self) -> Page:
        members = sorted({member for found in self.clusters for member in found.percent})
        rows = [[member, *(number(found.percent.get(member)) for found in self.clusters)] for member in members]
        table = Table("Percent of a core", ["", *(found.transfer for found in self.clusters)], rows)
        notes = [
            f"User and system time over {self.seconds:g} s after {REQUESTS} requests; all threads of all processes.",
            "A worker is its control process and its engine process; heartbeats go on.",
        ]
        return Page("idle", f"An idle cluster, {self.topology}", [table, targets_table(self.targets)], notes)


def measure_idle(
    topology: Path, transfer: str, settings: Sequence[str], seconds: float, log_dir: Path, say: Callable[[str], None]
) -> IdleCluster:
    """Starts the cluster, lets it work a little, then looks away for `seconds`. Raises `LaunchError`."""
    with Cluster(topology, (f"kv.transfer={transfer}", *settings), log_dir / transfer) as cluster:
        asyncio.run(_serve_some(cluster))
        cluster.wait_idle()
        time.sleep(SETTLE_SECONDS)
        before, begun = cluster.tree.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        after, lasted = cluster.tree.cpu_seconds(), time.monotonic() - begun
    percent = {name: (spent - before.get(name, 0.0)) / lasted * 100 for name, spent in after.items()}
    say(f"{transfer}: " + ", ".join(f"{name} {share:.2f}%" for name, share in sorted(percent.items())))
    return IdleCluster(transfer, {name: share for name, share in percent.items() if name != LAUNCHER})


async def _serve_some(cluster: Cluster) -> None:
    """Requests that are handed over, so that whatever work leaves behind in threads and connections is there."""
    card = cluster.workers()[0].member.model
    prompts = Prompts(0, card.vocab_size)
    async with open_session() as session:
        client = CompletionClient(session, cluster.url, card.name, OPTIONS)
        lines = [Timeline(stream="before", prompt_tokens=PROMPT_TOKENS, sent_at=0.0) for _ in range(REQUESTS)]
        asked = [prompts.prompt("before", number, PROMPT_TOKENS) for number in range(REQUESTS)]
        await asyncio.gather(
            *(client.stream(line, prompt, ANSWER_TOKENS) for line, prompt in zip(lines, asked, strict=True))
        )
    failed = [line.error for line in lines if line.error is not None]
    if failed:
        raise LaunchError(f"a request was not answered: {failed[0]}")

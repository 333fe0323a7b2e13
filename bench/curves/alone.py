"""A cluster in which one worker does all the work, and the requests that are put on it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.client import OPTIONS, CompletionClient, Timeline, open_session
from bench.cluster import Cluster
from bench.records import Record, fetch_records
from cluster.config import Topology
from cluster.errors import LaunchError
from cluster.topology import load_topology


class Asked(NamedTuple):
    """One request: its prompt, and how many tokens are wanted."""

    prompt: list[int]
    tokens: int


class Alone:
    """The worker, behind its router. All calls block."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        card = cluster.workers()[0].member.model
        self.model = card.name
        self.vocab_size = card.vocab_size
        self.context_length = card.context_length

    def ask(self, requests: Sequence[Asked]) -> list[Timeline]:
        """All at once. Raises `LaunchError` if one of them is not answered to its end."""
        return [line for line, _ in self._answers(requests, with_records=False)]

    def ask_with_records(self, requests: Sequence[Asked]) -> list[tuple[Timeline, Record | None]]:
        """With the router's record of each, where it has one."""
        return self._answers(requests, with_records=True)

    def _answers(self, requests: Sequence[Asked], *, with_records: bool) -> list[tuple[Timeline, Record | None]]:
        async def play() -> list[tuple[Timeline, Record | None]]:
            async with open_session() as session:
                client = CompletionClient(session, self._cluster.url, self.model, OPTIONS)
                now = time.monotonic()
                lines = [Timeline(stream="alone", prompt_tokens=len(each.prompt), sent_at=now) for each in requests]
                await asyncio.gather(
                    *(client.stream(line, each.prompt, each.tokens) for line, each in zip(lines, requests, strict=True))
                )
                ids = [line.id for line in lines] if with_records else []
                records = {record.id: record for record in await fetch_records(session, self._cluster.url, ids)}
                return [(line, records.get(line.id)) for line in lines]

        found = asyncio.run(play())
        failed = [line.error for line, _ in found if line.error is not None]
        if failed:
            raise LaunchError(f"a request was not answered: {failed[0]}")
        return found


class Place(NamedTuple):
    """Which cluster is measured."""

    topology: Path
    settings: tuple[str, ...]
    log_dir: Path

    def open(self) -> Cluster:
        return Cluster(self.topology, self.settings, self.log_dir)

    def resolve(self) -> Topology:
        return load_topology(self.topology, self.settings)


def cores_of(cpus: list[list[int]]) -> list[int]:
    """Of the first replica."""
    return cpus[0] if cpus else []

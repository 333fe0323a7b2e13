"""A cluster that nobody else uses, and single requests that are put on it."""

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

RECORD_SECONDS = 5.0
POLL_SECONDS = 0.01


class Asked(NamedTuple):
    """One request: its prompt, and how many tokens are wanted."""

    prompt: list[int]
    tokens: int


class Alone:
    """The only client of a running cluster. All calls block."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        card = cluster.workers()[0].member.model
        self.model = card.name
        self.vocab_size = card.vocab_size
        self.context_length = card.context_length

    def ask(self, requests: Sequence[Asked]) -> list[Timeline]:
        """All at once. Raises `LaunchError` if one of them is not answered to its end."""
        return asyncio.run(self._answers(requests))

    def ask_for_record(self, request: Asked) -> tuple[Timeline, Record]:
        """With the router's record of it. Raises `LaunchError` if there is none soon, too."""
        return asyncio.run(self._recorded(request))

    async def _recorded(self, request: Asked) -> tuple[Timeline, Record]:
        [line] = await self._answers([request])
        deadline = time.monotonic() + RECORD_SECONDS
        async with open_session() as session:
            while time.monotonic() < deadline:
                for record in await fetch_records(session, self._cluster.url, [line.id]):
                    # The workers' word of a leg's end comes after its last token.
                    if record.prefilled is not None:
                        return line, record
                await asyncio.sleep(POLL_SECONDS)
        raise LaunchError(f"no record of {line.id} after {RECORD_SECONDS:g} s")

    async def _answers(self, requests: Sequence[Asked]) -> list[Timeline]:
        now = time.monotonic()
        lines = [Timeline(stream="alone", prompt_tokens=len(each.prompt), sent_at=now) for each in requests]
        async with open_session() as session:
            client = CompletionClient(session, self._cluster.url, self.model, OPTIONS)
            await asyncio.gather(
                *(client.stream(line, each.prompt, each.tokens) for line, each in zip(lines, requests, strict=True))
            )
        failed = [line.error for line in lines if line.error is not None]
        if failed:
            raise LaunchError(f"a request was not answered: {failed[0]}")
        return lines


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

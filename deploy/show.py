"""`baton status` and `baton logs`: what is asked of a running cluster, put on the screen once or again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console, RenderableType
from rich.live import Live

from cluster.config import Bootstrap, LauncherName, Security, Topology
from cluster.errors import LaunchError
from cluster.messages import MemberStatus
from deploy.cluster_client import ask_bootstrap
from deploy.launchers.base import ProcessKind, Replica
from deploy.log_lines import readable
from deploy.operate import find_topology, open_cluster
from deploy.status import replica_table, status_table

WATCH_SECONDS = 1.0

_WORKERS = (ProcessKind.PREFILL, ProcessKind.DECODE)


class Wanted(NamedTuple):
    """Which cluster is asked."""

    topology_path: Path | None
    overrides: Sequence[str]
    bootstrap_url: str | None = None
    """In place of a topology."""


async def show_status(wanted: Wanted, console: Console, *, as_json: bool, watch: bool) -> None:
    """Prints the workers; with `watch` every second, until it is cancelled. Raises `LaunchError` if nobody answers:
    watching, it says so and goes on."""
    topology = await find_topology(wanted.topology_path, wanted.overrides)
    if not watch:
        _print(await _look(topology, wanted.bootstrap_url), topology, console, as_json=as_json)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            try:
                seen = await _look(topology, wanted.bootstrap_url)
            except LaunchError as error:
                live.update(str(error), refresh=True)
            else:
                if as_json or not console.is_terminal:
                    _print(seen, topology, console, as_json=as_json)
                else:
                    live.update(_table(seen, topology), refresh=True)
            await asyncio.sleep(WATCH_SECONDS)


async def show_logs(wanted: Wanted, name: str, lines: int, *, follow: bool, raw: bool) -> None:
    """Prints a log, made readable or as it is; following it does not end by itself. Raises `NotFound`."""
    topology = await find_topology(wanted.topology_path, wanted.overrides)
    async with open_cluster(topology, print, 0.0) as cluster:
        async for line in cluster.logs(name, lines, follow=follow):
            print(line if raw else readable(line), flush=True)


class _Seen(NamedTuple):
    members: list[MemberStatus] | None
    """None: bootstrap can't be asked from here."""
    others: list[Replica]


async def _look(topology: Topology | None, bootstrap_url: str | None) -> _Seen:
    """Raises `LaunchError` if bootstrap does not answer."""
    if bootstrap_url is None and topology is not None and topology.launch is LauncherName.KUBERNETES:
        return _Seen(None, await _replicas(topology))
    config = topology.bootstrap if topology else Bootstrap()
    async with ask_bootstrap(config, topology.security if topology else Security(), bootstrap_url) as bootstrap:
        members = await bootstrap.workers()
    if bootstrap_url is not None:
        return _Seen(members, [])
    known = {status.member.worker for status in members}
    replicas = await _replicas(topology)
    return _Seen(members, [each for each in replicas if each.kind in _WORKERS and each.name not in known])


async def _replicas(topology: Topology | None) -> list[Replica]:
    async with open_cluster(topology, lambda _line: None, 0.0) as cluster:
        return await cluster.status()


def _print(seen: _Seen, topology: Topology | None, console: Console, *, as_json: bool) -> None:
    if as_json:
        print(msgspec.json.encode(seen.others if seen.members is None else seen.members).decode(), flush=True)
    else:
        console.print(_table(seen, topology))


def _table(seen: _Seen, topology: Topology | None) -> RenderableType:
    if not any(seen):
        return "no workers"
    if seen.members is None:
        return replica_table(seen.others)
    lease_seconds = (topology.bootstrap if topology else Bootstrap()).lease_seconds
    return status_table(seen.members, lease_seconds, seen.others)

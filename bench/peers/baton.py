"""Baton itself, with one of its topologies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.client import OPTIONS
from bench.cluster import Cluster
from bench.contenders import Contender
from bench.peers.base import Card, Endpoint, shown

USAGE = {"stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Baton:
    """Implements `Peer`."""

    contender: Contender

    @property
    def card(self) -> Card:
        settings = [word for setting in self.contender.settings for word in ("--set", setting)]
        command = shown(["baton", "up", str(self.contender.topology), *settings])
        # The versions of all that it runs on are the setting's.
        return Card(f"Baton {self.contender.name.removeprefix('unified ')}", command, {}, ours=True)

    def check(self) -> None:
        """`make setup` has installed all that it needs."""

    @contextmanager
    def serve(self, log_dir: Path) -> Iterator[Endpoint]:
        with Cluster(self.contender.topology, self.contender.settings, log_dir) as cluster:
            model = cluster.workers()[0].member.model.name
            yield Endpoint(cluster.url, model, {**OPTIONS, **USAGE}, cluster.tree)

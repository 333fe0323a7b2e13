"""The places that only run processes, by the topology's `launch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cluster.config import Topology
from deploy.launchers.local import LocalProcesses
from deploy.launchers.processes import ProcessRunner

MakeRunner = Callable[[Path, Path], ProcessRunner]
"""From the run directory and the topology's file."""


class Place(NamedTuple):
    topology: Topology
    """With the addresses that it has there."""
    make_runner: MakeRunner


@contextmanager
def open_place(topology: Topology) -> Iterator[Place]:
    """Raises `LaunchError` if it can't be reached, `ConfigError` if what it needs is not installed."""
    yield Place(topology, local_processes)


def local_processes(directory: Path, topology_file: Path) -> LocalProcesses:
    return LocalProcesses(directory, ("--topology", str(topology_file)))

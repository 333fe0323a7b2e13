"""The places that only run processes, by the topology's `launch`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cluster.config import LauncherName, Topology
from cluster.errors import ConfigError
from deploy.gpus import GpuDealer, deal_gpus, memory_note, share_memory, visible_gpus
from deploy.launchers.local import LocalProcesses
from deploy.launchers.processes import ProcessRunner
from deploy.launchers.spread import SpreadProcesses

MakeRunner = Callable[[Path, Path], ProcessRunner]
"""From the run directory and the topology's file."""


class Place(NamedTuple):
    topology: Topology
    """With the addresses that it has there."""
    make_runner: MakeRunner
    notes: Sequence[str] = ()
    """Lines for whoever starts it."""


@contextmanager
def open_place(topology: Topology) -> Iterator[Place]:
    """Raises `LaunchError` if it can't be reached, `ConfigError` if what it needs is not installed."""
    if topology.launch is LauncherName.KUBERNETES:
        raise ConfigError(
            "launch: kubernetes: such a cluster runs by itself; `baton up` starts it, `baton down` stops it"
        )
    if topology.launch is LauncherName.RAY:
        try:
            from deploy.launchers.ray_place import connected, make_runner  # a large package, which most do without
        except ModuleNotFoundError as error:
            raise ConfigError(f"launch: ray: {error}; install it with `make setup-ray`, or pip install ray") from error
        with connected(topology) as resolved:
            yield Place(resolved, make_runner)
    else:
        gpus = deal_gpus(topology, visible_gpus(os.environ))
        notes = []
        if gpus is not None:
            topology = share_memory(topology, gpus)
            notes = [*gpus.story(), memory_note(topology)]
        yield Place(topology, partial(_local_processes, topology, gpus), notes)


def _local_processes(
    topology: Topology, gpus: GpuDealer | None, directory: Path, topology_file: Path
) -> SpreadProcesses:
    return SpreadProcesses(LocalProcesses(directory, ("--topology", str(topology_file)), gpus=gpus), topology)

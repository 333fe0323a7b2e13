"""Connecting to a Ray cluster, with a secret that its nodes share."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray

from cluster.access.security import read_secret
from cluster.config import Topology
from cluster.errors import LaunchError
from cluster.topology import load_topology
from deploy.launchers.processes import ProcessRunner
from deploy.launchers.ray import RayProcesses
from deploy.launchers.ray_topology import needs_of, parcel_of, with_addresses, with_secret_file


@contextlib.contextmanager
def connected(topology: Topology) -> Iterator[Topology]:
    """While the block runs, this process is a driver of the Ray cluster; what it has started there ends with it. Yields
    the topology with the addresses that it has there. Raises `LaunchError` if there is no such cluster, or if this
    machine is not one of its nodes."""
    try:
        ray.init(
            address=topology.ray.address,
            runtime_env=topology.ray.runtime_env or None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LaunchError(
            f"no Ray cluster at {topology.ray.address} of which this machine is a node: start one with `ray start "
            f"--head`, join one with `ray start --address=HOST:PORT`, or name its address in ray.address ({error})"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        if read_secret(topology.security) is None and not topology.security.allow_insecure:
            topology = with_secret_file(topology, stack.enter_context(_new_secret()))
        yield with_addresses(topology, ray.util.get_node_ip_address())


def make_runner(directory: Path, topology_file: Path) -> ProcessRunner:
    """For a topology of `connected`, as it was written for the processes of this machine."""
    topology = load_topology(topology_file)
    return RayProcesses(directory, ("--topology", str(topology_file)), needs_of(topology), parcel_of(topology))


@contextlib.contextmanager
def _new_secret() -> Iterator[Path]:
    """A file that only this user can read; it is there as long as the block runs."""
    descriptor, name = tempfile.mkstemp(prefix="baton-secret-")
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{secrets.token_hex(32)}\n")
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)

"""Connecting to a Ray cluster, with a secret that its nodes share."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ray

from cluster.access.security import read_secret
from cluster.config import Topology
from cluster.errors import ConfigError, LaunchError
from cluster.topology import load_topology
from deploy.launchers.processes import ProcessRunner
from deploy.launchers.ray import RayProcesses
from deploy.launchers.ray_topology import needs_of, parcel_of, with_addresses, with_secret_file

_CONNECT_SECONDS = 5.0


@contextlib.contextmanager
def connected(topology: Topology) -> Iterator[Topology]:
    """While the block runs, this process is a driver of the Ray cluster; what it has started there ends with it. Yields
    the topology with the addresses that it has there. Raises `LaunchError` if there is no such cluster, or if this
    machine is not one of its nodes, and `ConfigError` for an address of another kind."""
    _require_answer(topology.ray.address)
    try:
        ray.init(
            address=topology.ray.address,
            runtime_env=topology.ray.runtime_env or None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _not_there(topology.ray.address, error) from error
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        if read_secret(topology.security) is None and not topology.security.allow_insecure:
            topology = with_secret_file(topology, stack.enter_context(_new_secret()))
        yield with_addresses(topology, ray.util.get_node_ip_address())


def make_runner(directory: Path, topology_file: Path) -> ProcessRunner:
    """For a topology of `connected`, as it was written for the processes of this machine."""
    topology = load_topology(topology_file)
    common = ("--topology", str(topology_file))
    return RayProcesses(directory, common, needs_of(topology), parcel_of(topology), topology.internal_scheme)


def _require_answer(address: str) -> None:
    """Ray itself would try for a minute."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        raise ConfigError(f"ray.address: expected auto, or HOST:PORT of the head's GCS, found {address}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise _not_there(address, error) from error


def _not_there(address: str, error: Exception) -> LaunchError:
    return LaunchError(
        f"no Ray cluster at {address} of which this machine is a node: start one with `ray start --head`, join one "
        f"with `ray start --address=HOST:PORT`, or name its address in ray.address ({error})"
    )


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

"""Connecting to a Ray cluster, and what a topology becomes there: with addresses that nodes reach, and a secret."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import ray

from cluster.access.security import is_loopback, read_secret
from cluster.config import RayPool, Topology
from cluster.errors import LaunchError
from cluster.messages import Role
from cluster.topology import dump_topology, load_topology
from deploy.launchers.processes import ProcessRunner
from deploy.launchers.ray import Need, RayProcesses
from deploy.launchers.ray_host import Parcel


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
    needs = {
        role: _need(pool) for role, pool in ((Role.PREFILL, topology.ray.prefill), (Role.DECODE, topology.ray.decode))
    }
    return RayProcesses(directory, ("--topology", str(topology_file)), needs, parcel_of(topology))


def with_addresses(topology: Topology, node_address: str) -> Topology:
    """Addresses of this machine alone give way to the one by which other nodes reach it. The router's stays: who may
    reach the API, the topology says."""

    def reachable(host: str) -> str:
        return node_address if is_loopback(host) or _is_unspecified(host) else host

    model = Path(topology.model.path)
    return msgspec.structs.replace(
        topology,
        bootstrap=msgspec.structs.replace(topology.bootstrap, host=reachable(topology.bootstrap.host)),
        prefill=msgspec.structs.replace(topology.prefill, host=reachable(topology.prefill.host)),
        decode=msgspec.structs.replace(topology.decode, host=reachable(topology.decode.host)),
        # Actors work in a folder of their own: what is named from here is named in full.
        model=msgspec.structs.replace(topology.model, path=str(model.absolute())) if model.exists() else topology.model,
    )


def with_secret_file(topology: Topology, file: Path | None) -> Topology:
    security = msgspec.structs.replace(topology.security, secret_file=None if file is None else str(file))
    return msgspec.structs.replace(topology, security=security)


def parcel_of(topology: Topology) -> Parcel:
    """For the nodes: they don't have this machine's files."""
    secret = read_secret(topology.security)
    environment = {} if secret is None else {topology.security.secret_variable: secret}
    return Parcel(dump_topology(with_secret_file(topology, None)), environment)


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


def _need(pool: RayPool) -> Need:
    bundle = {"CPU": pool.cpus, "GPU": pool.gpus, **pool.resources}
    return Need({name: amount for name, amount in bundle.items() if amount}, ranks=1)


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False

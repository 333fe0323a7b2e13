"""What a topology becomes on Ray, and what its workers reserve there. Imports no Ray: any machine can say it."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from cluster.access.security import is_loopback, read_secret
from cluster.config import Decode, Prefill, Topology
from cluster.launch_config import RayPool
from cluster.messages import Role
from cluster.topology import dump_topology
from deploy.launchers.ray_host import Parcel


class Need(NamedTuple):
    """What a worker of one pool reserves."""

    bundle: Mapping[str, float]
    """Of each rank, as Ray names resources: {"CPU": 1, "decode": 1}."""
    ranks: int
    nodes: int = 1
    """That the ranks are spread over."""

    @property
    def bundles(self) -> list[Mapping[str, float]]:
        """What is reserved together: on one node a bundle for each rank, on several one for each node."""
        if self.nodes == 1:
            return [self.bundle] * self.ranks
        each = self.ranks // self.nodes
        return [{name: amount * each for name, amount in self.bundle.items()}] * self.nodes

    def __str__(self) -> str:
        amounts = " and ".join(f"{amount:g} {name}" for name, amount in self.bundles[0].items()) or "room"
        if self.nodes > 1:
            return f"{self.nodes} nodes with {amounts} free on each"
        return f"a node with {amounts} free" + (f", {self.ranks} times" if self.ranks > 1 else "")


def needs_of(topology: Topology) -> dict[Role, Need]:
    config = topology.ray
    return {Role.PREFILL: _need(config.prefill, topology.prefill), Role.DECODE: _need(config.decode, topology.decode)}


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


def _need(reserved: RayPool, pool: Prefill | Decode) -> Need:
    bundle = {"CPU": reserved.cpus, "GPU": reserved.gpus, **reserved.resources}
    return Need({name: amount for name, amount in bundle.items() if amount}, pool.grid.ranks, pool.nodes)


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False

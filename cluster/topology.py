"""Reads a topology: a YAML file and `--set` values become a checked `Topology`.

`cluster.settings` checks each value by itself; here are the checks of values that must fit each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import yaml

from cluster.config import Decode, LauncherName, Network, Prefill, Topology
from cluster.errors import ConfigError
from cluster.settings import Settings, build, read_override, read_yaml

_ANY_ADDRESS = frozenset({"0.0.0.0", "::"})
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def load_topology(path: str | Path, overrides: Sequence[str] = ()) -> Topology:
    """The topology in the YAML file at `path`, with `overrides` such as "kv.page_size=32" applied in order.

    Raises `ConfigError` for a file that can't be read, an unknown or repeated key, a bad value, or values that
    contradict each other; the message names the key's full path and file:line, or the --set.
    """
    settings = read_yaml(_read_text(Path(path)), str(path), Topology)
    for override in overrides:
        settings.update(read_override(override, Topology))
    topology = build(Topology, settings, str(path))
    check = _Checks(settings, str(path))
    check.pool(topology)
    check.cores("prefill", topology.prefill)
    check.cores("decode", topology.decode)
    check.gpus("prefill", topology.prefill, topology.launch)
    check.gpus("decode", topology.decode, topology.launch)
    check.nodes("prefill", topology.prefill)
    check.nodes("decode", topology.decode)
    check.network(topology)
    return topology


def dump_topology(topology: Topology) -> str:
    """YAML of all settings, defaults included, from which `load_topology` makes an equal topology."""
    dumped: str = yaml.safe_dump(msgspec.to_builtins(topology), sort_keys=False)
    return dumped


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path}: the topology can't be read: {error.strerror}") from error


class _Checks:
    """What no key can be blamed for alone; an error still points at the place of one."""

    def __init__(self, settings: Settings, origin: str) -> None:
        self._settings = settings
        self._origin = origin

    def pool(self, topology: Topology) -> None:
        kv = topology.kv
        if kv.pool_tokens is not None and kv.pool_tokens < kv.page_size:
            raise self._error("kv.pool_tokens", f"{kv.pool_tokens} tokens don't fill one page of {kv.page_size}")
        if kv.rdma_devices and kv.network is not Network.RDMA:
            raise self._error("kv.rdma_devices", f"only with kv.network=rdma, and that is {kv.network.value}")

    def cores(self, name: str, pool: Prefill | Decode) -> None:
        key = f"{name}.cpus"
        if not pool.cpus:
            return
        if len(pool.cpus) < pool.replicas:
            raise self._error(key, f"expected cores for each of {pool.replicas} replicas, found {len(pool.cpus)}")
        for index, cores in enumerate(pool.cpus):
            if not cores or len(set(cores)) < len(cores):
                raise self._error(f"{key}[{index}]", f"expected one or more different cores, found {cores}")

    def gpus(self, name: str, pool: Prefill | Decode, launch: LauncherName) -> None:
        key = f"{name}.gpus"
        if not pool.gpus:
            return
        if launch is not LauncherName.LOCAL:
            raise self._error(key, f"only with launch=local; {launch.value} gives workers their GPUs itself")
        if len(pool.gpus) < pool.replicas:
            raise self._error(key, f"expected GPUs for each of {pool.replicas} replicas, found {len(pool.gpus)}")
        for index, gpus in enumerate(pool.gpus):
            if len(gpus) != pool.grid.ranks or len(set(gpus)) < len(gpus):
                raise self._error(
                    f"{key}[{index}]", f"expected a GPU of its own for each of {pool.grid.ranks} ranks, found {gpus}"
                )

    def nodes(self, name: str, pool: Prefill | Decode) -> None:
        if pool.grid.ranks % pool.nodes:
            raise self._error(f"{name}.nodes", f"{pool.grid.ranks} ranks can't be as many on each of {pool.nodes}")

    def network(self, topology: Topology) -> None:
        bootstrap, router = topology.bootstrap, topology.router
        if router.port and router.port == bootstrap.port and _overlap(router.host, bootstrap.host):
            raise self._error("router.port", f"{router.port} is bootstrap's port too; each process needs its own")
        if bootstrap.lease_seconds <= bootstrap.heartbeat_seconds:
            raise self._error(
                "bootstrap.lease_seconds",
                f"expected more than one heartbeat ({bootstrap.heartbeat_seconds:g} s), "
                f"found {bootstrap.lease_seconds:g}",
            )

    def _error(self, key: str, problem: str) -> ConfigError:
        setting = self._settings.get(key.partition("[")[0])
        return ConfigError(f"{setting.place if setting else self._origin}: {key}: {problem}")


def _overlap(one: str, other: str) -> bool:
    """Whether a port of one address can be taken on the other too, as far as their names tell."""
    return one == other or bool({one, other} & _ANY_ADDRESS) or {one, other} <= _LOOPBACK

"""The transfer engines. `open_backend` is the only place that knows their names; importing this loads none of them."""

from __future__ import annotations

from cluster.config import KV, TransferName
from cluster.errors import ConfigError
from kv_transfer.backends.base import PoolMemory, TransferBackend
from kv_transfer.backends.environment import apply_network, backend_environment
from kv_transfer.backends.verbs import devices_of, require_opened, usable_ports

__all__ = ["backend_environment", "open_backend"]


def open_backend(kv: KV, agent: str, pool: PoolMemory, host: str) -> TransferBackend:
    """Starts the engine and registers `pool`. `agent` names us in its logs, `host` is where peers reach us.

    Raises `ConfigError` if the engine's package is missing (with what to install), or if it does not use the network
    that `kv` asks for.
    """
    ports = usable_ports(kv)
    apply_network(kv, ports)
    backend: TransferBackend
    if kv.transfer is TransferName.NIXL:
        from kv_transfer.backends.nixl import NixlBackend

        backend = NixlBackend(agent, pool)
    else:
        from kv_transfer.backends.mooncake import MooncakeBackend

        backend = MooncakeBackend(host, pool, devices_of(ports))
    try:
        require_opened(kv)
    except ConfigError:
        backend.close()
        raise
    return backend

"""The transfer engines. `open_backend` is the only place that knows their names; importing this loads none of them."""

from __future__ import annotations

from cluster.config import TransferName
from kv_transfer.backends.base import PoolMemory, TransferBackend
from kv_transfer.backends.environment import backend_environment

__all__ = ["backend_environment", "open_backend"]


def open_backend(name: TransferName, agent: str, pool: PoolMemory, host: str) -> TransferBackend:
    """Starts the engine and registers `pool`. `agent` names us in its logs, `host` is where peers reach us.

    Raises `ConfigError`, with what to install, if the engine's package is missing.
    """
    if name is TransferName.NIXL:
        from kv_transfer.backends.nixl import NixlBackend

        return NixlBackend(agent, pool)
    from kv_transfer.backends.mooncake import MooncakeBackend

    return MooncakeBackend(host, pool)

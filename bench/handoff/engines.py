"""NIXL and Mooncake as their own examples use them: no threads of ours, no digests, no messages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cluster.config import TransferName
from cluster.errors import ConfigError, TransferFailed

HOST = "127.0.0.1"
_DONE = 0


class Pool(NamedTuple):
    """`pages` pages in a row."""

    address: int
    pages: int
    page_bytes: int

    @property
    def size(self) -> int:
        return self.pages * self.page_bytes

    def addresses(self, pages: Sequence[int]) -> list[int]:
        return [self.address + page * self.page_bytes for page in pages]


class Remote(NamedTuple):
    """What the other end needs to write to this one."""

    endpoint: bytes
    pool: Pool


class Engine(Protocol):
    """One end. All calls come from one thread; `write` returns when all bytes are at their place, or raises
    `TransferFailed`."""

    @property
    def endpoint(self) -> bytes: ...

    def connect(self, remote: Remote) -> None: ...

    def write(self, sources: Sequence[int], targets: Sequence[int]) -> None: ...

    def progress(self) -> None:
        """To be called regularly by an end that is written to."""


class Nixl:
    """Raises `ConfigError` if it is not installed."""

    def __init__(self, name: str, pool: Pool) -> None:
        try:
            from nixl._api import nixl_agent, nixl_agent_config
        except ImportError as error:
            raise ConfigError(f"nixl can't be loaded: {error}") from error
        # As in Baton: the progress thread spins, and is slower.
        self._agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self._agent.register_memory([(pool.address, pool.size, 0, "")], "DRAM")
        self._ours = self._prepare("NIXL_INIT_AGENT", pool)
        self._theirs: Any = None

    @property
    def endpoint(self) -> bytes:
        found: bytes = self._agent.get_agent_metadata()
        return found

    def connect(self, remote: Remote) -> None:
        self._theirs = self._prepare(self._agent.add_remote_agent(remote.endpoint), remote.pool)

    def write(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        request = self._agent.make_prepped_xfer("WRITE", self._ours, list(sources), self._theirs, list(targets))
        state = self._agent.transfer(request)
        while state == "PROC":
            state = self._agent.check_xfer_state(request)
        request.release()
        if state != "DONE":
            raise TransferFailed(f"NIXL ended a write with {state}")

    def progress(self) -> None:
        self._agent.get_new_notifs()

    def _prepare(self, agent: Any, pool: Pool) -> Any:
        rows = np.empty((pool.pages, 3), dtype=np.uint64)
        rows[:, 0] = pool.addresses(range(pool.pages))
        rows[:, 1] = pool.page_bytes
        rows[:, 2] = 0
        return self._agent.prep_xfer_dlist(agent.decode() if isinstance(agent, bytes) else agent, rows, "DRAM")


class Mooncake:
    """Raises `ConfigError` if it is not installed, or can't start."""

    def __init__(self, name: str, pool: Pool) -> None:
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise ConfigError(f"mooncake can't be loaded: {error}") from error
        self._pool = pool
        self._engine = TransferEngine()
        # It takes TCP by itself where there is no RDMA device, as Baton's does.
        if self._engine.initialize(HOST, "P2PHANDSHAKE", "rdma" if _has_device() else "tcp", "") != _DONE:
            raise ConfigError(f"mooncake can't start {name} on {HOST}")
        if self._engine.register_memory(pool.address, pool.size) != _DONE:
            raise ConfigError(f"mooncake can't register {pool.size} bytes")
        self._remote: Remote | None = None

    @property
    def endpoint(self) -> bytes:
        return f"{HOST}:{self._engine.get_rpc_port()}".encode()

    def connect(self, remote: Remote) -> None:
        self._remote = remote

    def write(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        if self._remote is None:
            raise TransferFailed("not connected")
        code = self._engine.batch_transfer_sync_write(
            self._remote.endpoint.decode(),
            self._pool.addresses(sources),
            self._remote.pool.addresses(targets),
            [self._pool.page_bytes] * len(sources),
        )
        if code != _DONE:
            raise TransferFailed(f"Mooncake ended a write with {code}")

    def progress(self) -> None:
        """Its own threads look after that."""


def _has_device() -> bool:
    devices = Path("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())


def open_engine(transfer: TransferName, name: str, pool: Pool) -> Engine:
    return Nixl(name, pool) if transfer is TransferName.NIXL else Mooncake(name, pool)

"""NIXL over UCX: RDMA where there is a NIC, CUDA IPC or process_vm_writev within a host, TCP otherwise.

The agent runs without NIXL's progress thread, which would spin a core: the transfer thread drives both ends. Page
descriptors are prepared once per pool, so that a write is a list of page numbers. There is no deadline of NIXL's own;
UCX's TCP timeouts (see `environment`) turn a partition into a failed write after about five seconds.

Over RDMA, pages arrive in a process that is stopped. But a write is done when all that UCX has sent to the peer is
acknowledged, and its question whether the peer lives, every 20 seconds, is answered by the peer's software: a write
that comes upon one waits until that process goes on, or UCX gives it up after half a minute.

A request that is released, a peer that is removed, memory that is deregistered: bytes land all the same. Only an agent
that is destroyed sends nothing more, as it has no thread of its own; `NixlBackend.restart` does that.
"""

from __future__ import annotations

import contextlib
import gc
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from cluster.config import TransferName
from cluster.errors import ConfigError, PeerUnreachable, ProtocolError, TransferStuck
from kv_transfer.backends.base import PoolDescriptor, PoolMemory, WriteState
from kv_transfer.backends.environment import apply_defaults
from kv_transfer.backends.sockets import drop_unsent_on_close
from kv_transfer.shard_plan import PageSlice, Runs

_STATES = {"DONE": WriteState.DONE, "PROC": WriteState.PENDING, "ERR": WriteState.FAILED}
_WRITES_THAT_CONNECT = 2
"""UCX makes its connections in `connect` and with the first write; by the second they are all there."""


class NixlWrite:
    """One posted request. NIXL's handle is released as soon as the write is terminal, and never before: NIXL would
    forget a pending write, not stop it."""

    def __init__(self, agent: Any, request: Any, peer_faults: tuple[type[Exception], ...]) -> None:
        self._agent = agent
        self._request = request
        self._peer_faults = peer_faults
        self._state = WriteState.PENDING
        self._advance(agent.transfer)

    def poll(self) -> WriteState:
        if self._state is WriteState.PENDING:
            self._advance(self._agent.check_xfer_state)
        return self._state

    def end_with_agent(self) -> None:
        """Lets go of the agent, which is about to be destroyed: a write under way fails."""
        if self._state is WriteState.PENDING:
            self._state = WriteState.FAILED
            self._release()
        self._agent = None

    def _advance(self, step: Callable[[Any], str]) -> None:
        """Posts or asks. A fault of the connection is terminal: UCX then drops all that was posted on it."""
        try:
            self._state = _STATES[step(self._request)]
        except self._peer_faults:
            self._state = WriteState.FAILED
        if self._state is not WriteState.PENDING:
            self._release()

    def _release(self) -> None:
        with contextlib.suppress(*self._peer_faults):  # its destructor tries again
            self._request.release()
        self._request = None


@dataclass
class _Peer:
    agent: str
    ours: Any
    """Prepared descriptors of our pages, or of their parts that go to this peer."""
    pages: Any
    """The same of its own."""
    pool: PoolDescriptor
    runs: int
    """Descriptors of each page."""
    writes: int = 0


class NixlBackend:
    """A `TransferBackend`. `agent` is for NIXL's logs; a random part makes each instance a new one to its peers.

    Raises `ConfigError` if NIXL is not installed.
    """

    name = "nixl"

    def __init__(self, agent: str, pool: PoolMemory) -> None:
        self._api = _import_api()
        kinds = self._api.nixlBind
        # They have no common base. Others that NIXL raises are our own mistakes and end the process.
        self._peer_faults: tuple[type[Exception], ...] = (
            kinds.nixlBackendError,
            kinds.nixlCancelledError,
            kinds.nixlNotFoundError,
            kinds.nixlRemoteDisconnectError,
        )
        self._descriptor_faults: tuple[type[Exception], ...] = (kinds.nixlMismatchError, kinds.nixlInvalidParamError)
        self._name = agent
        self._pool = pool
        self._memory, self._device = _memory_kind(pool.device)
        self._agent: Any = None
        self._peers: dict[str, _Peer] = {}
        self._writes: weakref.WeakSet[NixlWrite] = weakref.WeakSet()
        self._start()

    def connect(self, peer: str, descriptor: bytes, part: PageSlice | None = None) -> None:
        pool = PoolDescriptor.decode(descriptor, backend=self.name, page_bytes=self._pool.page_bytes, part=part)
        whole = Runs(0, self._pool.page_bytes)
        ours, theirs = part or PageSlice(whole, whole)
        self.disconnect(peer)
        try:
            added = self._agent.add_remote_agent(pool.endpoint)
            name = added.decode() if isinstance(added, bytes) else added
            pages = self._prepare(name, pool, theirs)
        except self._descriptor_faults as error:
            raise ProtocolError(f"the NIXL metadata of {peer} is unreadable: {error}") from error
        except self._peer_faults as error:
            raise PeerUnreachable(f"can't reach the memory of {peer}: {error}") from error
        self._peers[peer] = _Peer(name, self._own_pages(ours), pages, pool, ours.times)

    def disconnect(self, peer: str) -> None:
        known = self._peers.pop(peer, None)
        if known is None:
            return
        known.pages.release()
        with contextlib.suppress(*self._peer_faults):  # NIXL may have dropped it when the connection broke
            self._agent.remove_remote_agent(known.agent)

    def write(self, peer: str, sources: Sequence[int], targets: Sequence[int]) -> NixlWrite:
        if peer not in self._peers:
            raise PeerUnreachable(f"{peer} is not connected")
        known = self._peers[peer]
        for page in sources:
            self._pool.page_address(page)
        known.pool.page_addresses(targets)
        try:
            request = self._agent.make_prepped_xfer(
                "WRITE", known.ours, _rows(sources, known.runs), known.pages, _rows(targets, known.runs)
            )
        except self._peer_faults as error:
            raise PeerUnreachable(f"can't write to {peer}: {error}") from error
        write = NixlWrite(self._agent, request, self._peer_faults)
        self._writes.add(write)
        known.writes += 1
        if known.writes <= _WRITES_THAT_CONNECT:
            drop_unsent_on_close()
        return write

    def progress(self) -> None:
        # Asking for notifications, of which we send none, is how NIXL lets a passive side drive its connections.
        self._agent.get_new_notifs()

    def restart(self) -> None:
        drop_unsent_on_close()
        self._destroy()
        self._start()

    def close(self) -> None:
        if self._agent is None:
            return
        for peer in list(self._peers):
            self.disconnect(peer)
        for pages in self._prepared.values():
            pages.release()
        self._agent.deregister_memory(self._registration)
        self._agent = None

    def _start(self) -> None:
        """A fresh agent with the pool registered; about half a second."""
        config = self._api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent = self._api.nixl_agent(f"{self._name}-{uuid.uuid4().hex[:12]}", config)
        pool = self._pool
        self._registration = self._agent.register_memory(
            [(pool.address, pool.total_bytes, self._device, "")], self._memory
        )
        self._prepared: dict[Runs, Any] = {}
        self._own_pages(Runs(0, pool.page_bytes))
        self.descriptor = PoolDescriptor(
            self.name, self._agent.get_agent_metadata(), pool.address, pool.pages, pool.page_bytes, pool.device
        ).encode()

    def _destroy(self) -> None:
        """Ends the agent with all its writes. It lives as long as anything refers to it, so that is made sure of."""
        for write in list(self._writes):
            write.end_with_agent()
        self._peers.clear()
        self._prepared.clear()
        self._registration = None
        native = weakref.ref(self._agent.agent)
        self._agent = None
        if native() is not None:
            gc.collect()
        if native() is not None:
            raise TransferStuck("NIXL's agent can't be ended: something still refers to it")

    def _own_pages(self, runs: Runs) -> Any:
        """Descriptors of these bytes of all our pages; prepared once, for they are many."""
        if runs not in self._prepared:
            self._prepared[runs] = self._prepare("NIXL_INIT_AGENT", self._pool, runs)
        return self._prepared[runs]

    def _prepare(self, agent: str, pool: PoolMemory | PoolDescriptor, runs: Runs) -> Any:
        """Descriptors of these bytes of all pages of a pool: rows of (address, bytes, device), page by page."""
        memory, device = _memory_kind(pool.device)
        begins = np.arange(pool.pages, dtype=np.uint64) * np.uint64(pool.page_bytes) + np.uint64(pool.address)
        within = np.array(runs.addresses([0]), dtype=np.uint64)
        rows = np.empty((pool.pages * runs.times, 3), dtype=np.uint64)
        rows[:, 0] = np.add.outer(begins, within).ravel()
        rows[:, 1] = runs.size
        rows[:, 2] = device
        return self._agent.prep_xfer_dlist(agent, rows, memory)


def _rows(pages: Sequence[int], runs: int) -> list[int]:
    """Numbers of the descriptors that `NixlBackend._prepare` makes of these pages, `runs` of each."""
    return [page * runs + run for page in pages for run in range(runs)]


def _import_api() -> ModuleType:
    apply_defaults(TransferName.NIXL)
    try:
        from nixl import _api
    except ImportError as error:
        raise ConfigError(f"kv.transfer: nixl can't be loaded ({error}); install it with: pip install nixl") from error
    api: ModuleType = _api
    return api


def _memory_kind(device: str) -> tuple[str, int]:
    """NIXL's name of the memory, and the device's number."""
    if device == "cpu":
        return "DRAM", 0
    kind, _, number = device.partition(":")
    if kind != "cuda":
        raise ConfigError(f"kv.transfer: nixl knows no memory of device {device!r}")
    return "VRAM", int(number or 0)

"""Mooncake's transfer engine: RDMA where there is a NIC, TCP otherwise.

Its batch write blocks, and one that it reports as failed may go on in its own threads until the engine is destroyed. So
each peer has an engine of its own and a thread that waits for it (an engine costs a millisecond, three sleeping
threads and a port): a failed write is called FAILED only after its engine is gone, without disturbing other peers.

Two waits of Mooncake's are cut short by ending the connections that it waits at. A first write asks the peer for its
memory, for up to a minute, whatever Mooncake's timeout for writes (see `environment`) is. And an engine's end waits for
the engine's threads, of which one listens in turns of a second, with the interpreter locked: all of the process waits.
(It also waits for what it was still writing over RDMA, for up to ten seconds. A NIC gives such writes up before
Mooncake does, soft-RoCE never does.) A write that does not come back even so can't be ended at all.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from cluster.config import TransferName
from cluster.errors import ConfigError, PeerUnreachable, ProtocolError, TransferStuck
from kv_transfer.backends.base import PoolDescriptor, PoolMemory, WriteState
from kv_transfer.backends.environment import apply_defaults
from kv_transfer.backends.sockets import addresses, drop_unsent_on_close, hang_up
from kv_transfer.shard_plan import PageSlice, Runs

ENTRIES_PER_BATCH = 1024
"""Mooncake refuses batches of more than about 2,000 entries."""

RESTART_SECONDS = 3.0
"""For calls to come back whose connections have been ended."""

_NO_LOG = 3
"""glog's level that leaves out everything but what ends the process."""


@dataclass
class MooncakeWrite:
    """One batch, as addresses; its peer's thread sets `state`, once."""

    sources: list[int]
    targets: list[int]
    size: int
    """Bytes at each of them."""
    state: WriteState = WriteState.PENDING

    def poll(self) -> WriteState:
        return self.state


class _Channel:
    """Our way to one peer: an engine, and the thread that waits for its writes, in order."""

    def __init__(
        self,
        host: str,
        pool: PoolMemory,
        devices: Sequence[str],
        remote: PoolDescriptor,
        peer: str,
        part: PageSlice,
    ) -> None:
        self.remote = remote
        self.part = part
        self._engine = _open_engine(host, pool, devices)
        self._port: int = self._engine.get_rpc_port()
        self._connected = False
        self._writes: SimpleQueue[MooncakeWrite | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"mooncake {peer}", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> bool:
        return self._engine is None

    def post(self, write: MooncakeWrite) -> None:
        self._writes.put(write)

    def close(self) -> None:
        """Returns at once; the engine ends on the channel's thread, after its writes."""
        self._writes.put(None)

    def interrupt(self) -> None:
        """Closes it, and has the engine give up what it asks of the peer."""
        self.close()
        self._hang_up()

    def ends_within(self, seconds: float) -> bool:
        """Of a closed one; then all its writes have ended."""
        self._thread.join(max(seconds, 0.0))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (write := self._writes.get()) is not None:
            done = self._copy(write)
            if not done and not self.broken:
                self._hang_up()
                self._end()
            elif done and not self._connected:
                self._connected = True
                drop_unsent_on_close()
            write.state = WriteState.DONE if done else WriteState.FAILED
        self._end()

    def _hang_up(self) -> None:
        hang_up(self._port, addresses(*_split(self.remote.endpoint)))

    def _end(self) -> None:
        """The engine is gone when this returns, with all that it was writing."""
        drop_unsent_on_close()
        hang_up(self._port)
        self._engine = None

    def _copy(self, write: MooncakeWrite) -> bool:
        """Whether all is in the peer's memory."""
        session = self.remote.endpoint.decode()
        for start in range(0, len(write.sources), ENTRIES_PER_BATCH):
            sources = write.sources[start : start + ENTRIES_PER_BATCH]
            targets = write.targets[start : start + ENTRIES_PER_BATCH]
            sizes = [write.size] * len(sources)
            if self._engine is None or self._engine.batch_transfer_sync_write(session, sources, targets, sizes) != 0:
                return False
        return True


class MooncakeBackend:
    """A `TransferBackend`. `host` is the address at which peers reach us, `devices` the RDMA devices to use, if any.

    Raises `ConfigError` if Mooncake is not installed or can't be loaded.
    """

    name = "mooncake"

    def __init__(self, host: str, pool: PoolMemory, devices: Sequence[str] = ()) -> None:
        self._host = host
        self._pool = pool
        self._devices = devices
        self._engine = _open_engine(host, pool, devices)
        self._channels: dict[str, _Channel] = {}
        self.descriptor = PoolDescriptor(
            self.name,
            f"{host}:{self._engine.get_rpc_port()}".encode(),
            pool.address,
            pool.pages,
            pool.page_bytes,
            pool.device,
        ).encode()

    def connect(self, peer: str, descriptor: bytes, part: PageSlice | None = None) -> None:
        remote = PoolDescriptor.decode(descriptor, backend=self.name, page_bytes=self._pool.page_bytes, part=part)
        _split(remote.endpoint)
        self.disconnect(peer)
        whole = Runs(0, self._pool.page_bytes)
        part = part or PageSlice(whole, whole)
        self._channels[peer] = _Channel(self._host, self._pool, self._devices, remote, peer, part)

    def disconnect(self, peer: str) -> None:
        channel = self._channels.pop(peer, None)
        if channel is not None:
            channel.close()

    def write(self, peer: str, sources: Sequence[int], targets: Sequence[int]) -> MooncakeWrite:
        channel = self._channels.get(peer)
        if channel is None or channel.broken:
            raise PeerUnreachable(f"{peer} is not connected")
        ours, theirs = channel.part
        begins = ours.addresses(self._pool.page_address(page) for page in sources)
        write = MooncakeWrite(begins, theirs.addresses(channel.remote.page_addresses(targets)), ours.size)
        channel.post(write)
        return write

    def progress(self) -> None:
        """Nothing to do: Mooncake's own threads sleep in the kernel until a peer writes."""

    def restart(self) -> None:
        """The engine that peers write through stays, and with it our `descriptor`."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.interrupt()
        until = time.monotonic() + RESTART_SECONDS
        for peer, channel in channels.items():
            if not channel.ends_within(until - time.monotonic()):
                raise TransferStuck(f"Mooncake's write to {peer} can't be ended")

    def close(self) -> None:
        for peer in list(self._channels):
            self.disconnect(peer)
        if self._engine is not None:
            self._engine.unregister_memory(self._pool.address)
            hang_up(self._engine.get_rpc_port())
        self._engine = None


def _split(endpoint: bytes) -> tuple[str, int]:
    """Host and port. Raises `ProtocolError` for an endpoint that has none."""
    host, _, port = endpoint.decode(errors="replace").rpartition(":")
    if not host or not port.isdecimal():
        raise ProtocolError(f"no endpoint of Mooncake's: {endpoint!r}")
    return host, int(port)


def _open_engine(host: str, pool: PoolMemory, devices: Sequence[str]) -> Any:
    """A started engine with the pool registered."""
    engine = _import_engine().TransferEngine()
    # "rdma" is TCP where there is no NIC, but says so only in its log; where there is none we ask for TCP outright.
    if engine.initialize(host, "P2PHANDSHAKE", "rdma" if devices else "tcp", ",".join(devices)) != 0:
        raise ConfigError(f"kv.transfer: mooncake can't start on {host}")
    if engine.register_memory(pool.address, pool.total_bytes) != 0:
        raise ConfigError(
            f"kv.transfer: mooncake can't register {pool.total_bytes} bytes of {pool.device} memory; for RDMA, the "
            "limit of locked memory (ulimit -l) must allow them"
        )
    return engine


def _import_engine() -> Any:
    apply_defaults(TransferName.MOONCAKE)
    try:
        from mooncake import engine
    except ImportError as error:
        raise ConfigError(
            f"kv.transfer: mooncake can't be loaded ({error}); install it with: pip install "
            "'baton-serving[mooncake-cpu]' (or [mooncake] on machines with CUDA); it needs libibverbs.so.1"
        ) from error
    _quiet(engine.__file__)
    return engine


def _quiet(library: str) -> None:
    """Mooncake writes lines of alarm to stderr in normal use, and has no setting for it: glog's own flag has."""
    try:
        level = ctypes.c_int.in_dll(ctypes.CDLL(library), "_ZN3fLI17FLAGS_minloglevelE")
    except (OSError, ValueError):
        return
    if "GLOG_minloglevel" not in os.environ:
        level.value = _NO_LOG

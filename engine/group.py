"""The ranks that compute one model together: what they say to each other in the middle of a step.

All methods are called on the step loop's thread, by all ranks in the same order: a rank that is missing is waited for.
When one dies, whoever waits for it is ended from outside (`cluster.engine_host`), or finds that it has gone.
"""

from __future__ import annotations

import copy
import ipaddress
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import psutil
import torch
import torch.distributed as distributed
import torch.nn.functional as functional
from torch import Tensor

from cluster.config import Switch
from cluster.errors import ConfigError
from cluster.ranks import Meeting, MeetingFile, RankGone
from engine.symmetric_sums import SymmetricSums, open_symmetric_sums

SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
PAIR = 2
LOOPBACK = "lo"
"""For a group that lives on one host: its sockets are nobody else's business."""


class Group(Protocol):
    rank: int
    size: int

    def add_up(self, share: Tensor) -> None:
        """Makes `share`, contiguous, the sum of all ranks' shares of the same shape: the same bits on each rank."""

    def gather(self, columns: Tensor, widths: Sequence[int]) -> Tensor:
        """On rank 0, all ranks' columns side by side, [rows, sum(widths)]; on the others, no rows of them. `columns` is
        [rows, widths[rank]]."""


class TorchGroup:
    """Implements `Group` by torch.distributed: gloo on CPU, NCCL on CUDA. One per process, and those split from it."""

    def __init__(self, rank: int, size: int, rendezvous: Meeting, device: torch.device) -> None:
        """Returns when all ranks are here. Raises `ConfigError` if they don't come together."""
        interface = _interface(rendezvous)
        for name in SOCKETS if interface else ():
            os.environ.setdefault(name, interface)
        self.rank = rank
        self.size = size
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            store = _store(rendezvous, size)
            distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
        except RuntimeError as error:
            raise ConfigError(f"the {size} ranks of this worker don't come together by {backend}: {error}") from error
        self._ranks: Any = distributed.group.WORLD
        """torch's name of them."""
        self._on_one_host = isinstance(rendezvous, MeetingFile)
        self._symmetric: SymmetricSums | None = None

    def split(self, size: int) -> TorchGroup:
        """Of each so many ranks that follow each other, a group; ours. All ranks must ask for it."""
        with ranks_gone():
            groups = [distributed.new_group(list(range(first, first + size))) for first in range(0, self.size, size)]
        part = copy.copy(self)
        part.rank, part.size, part._ranks = self.rank % size, size, groups[self.rank // size]
        return part

    def open_symmetric(self, device: torch.device, wanted: Switch) -> None:
        """From now on small sums go by memory that the GPUs of this host share, if `wanted`. All ranks must ask for it.
        Raises `ConfigError` if it must be had and can't."""
        self._symmetric = open_symmetric_sums(self._ranks, device, wanted, one_host=self._on_one_host)

    def add_up(self, share: Tensor) -> None:
        with ranks_gone():
            if self._symmetric is not None and self._symmetric.takes(share):
                self._symmetric.add_up(share)
            else:
                self._add_up(share)

    def _add_up(self, share: Tensor) -> None:
        if self.size == PAIR or share.device.type == "cuda":
            distributed.all_reduce(share, group=self._ranks)
            return
        # With more ranks, gloo adds in an order that depends on where in the tensor a value is: a row's result would
        # depend on the rows beside it.
        parts = [torch.empty_like(share) for _ in range(self.size)]
        distributed.all_gather(parts, share, group=self._ranks)
        torch.sum(torch.stack(parts), 0, out=share)

    def gather(self, columns: Tensor, widths: Sequence[int]) -> Tensor:
        padded = functional.pad(columns, (0, max(widths) - widths[self.rank])).contiguous()
        parts = [torch.empty_like(padded) for _ in widths] if self.rank == 0 else None
        with ranks_gone():
            distributed.gather(padded, parts, distributed.get_global_rank(self._ranks, 0), group=self._ranks)
        if parts is None:
            return columns.new_empty(0, sum(widths))
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)


def _store(rendezvous: Meeting, size: int) -> Any:
    """A torch.distributed.Store, which torch does not name for type checkers. Raises `RuntimeError` if rank 0's port
    can't be reached."""
    if isinstance(rendezvous, MeetingFile):
        return distributed.FileStore(rendezvous.path, size)  # type: ignore[attr-defined]
    listener = rendezvous.listener
    return distributed.TCPStore(  # type: ignore[attr-defined]
        rendezvous.host,
        rendezvous.port,
        size,
        is_master=listener is not None,
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def _interface(rendezvous: Meeting) -> str:
    """The network interface by which the other ranks reach this one; empty if none has that address, which may be
    translated on the way: then it is torch's choice."""
    if isinstance(rendezvous, MeetingFile):
        return LOOPBACK
    return interface_of(rendezvous.own_host)


def interface_of(host: str) -> str:
    """Of the address, or name, of this machine; empty if it is none of its own."""
    try:
        wanted = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return ""
    if any(ipaddress.ip_address(address).is_loopback for address in wanted):
        return LOOPBACK
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, own in interfaces if any(each.address in wanted for each in own)), "")


@contextmanager
def ranks_gone() -> Iterator[None]:
    """`RankGone` for what torch says when a connection breaks: there is nothing else that can go wrong here."""
    try:
        yield
    except RuntimeError as error:
        raise RankGone(str(error)) from error


class ThreadMeeting:
    """Where the `ThreadGroup`s of one process meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.brought: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size)


class ThreadGroup:
    """Implements `Group` for ranks that are threads of one process: for tests."""

    def __init__(self, meeting: ThreadMeeting, rank: int) -> None:
        self.rank = rank
        self.size = meeting.size
        self._meeting = meeting

    def add_up(self, share: Tensor) -> None:
        parts = self._exchange(share.clone())
        share.copy_(torch.stack(parts).sum(0))

    def gather(self, columns: Tensor, widths: Sequence[int]) -> Tensor:
        parts = self._exchange(columns.clone())
        return torch.cat(parts, 1) if self.rank == 0 else columns.new_empty(0, sum(widths))

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        meeting = self._meeting
        meeting.brought[self.rank] = tensor
        meeting.barrier.wait()
        found = [part for part in meeting.brought if part is not None]
        meeting.barrier.wait()
        return found

"""The ranks that compute one model together: what they say to each other in the middle of a step.

All methods are called on the step loop's thread, by all ranks in the same order: a rank that is missing is waited for.
When one dies, whoever waits for it is ended from outside (`cluster.engine_host`), or finds that it has gone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as distributed
import torch.nn.functional as functional
from torch import Tensor

from cluster.errors import ConfigError
from cluster.ranks import RankGone

SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
PAIR = 2
LOOPBACK = "lo"
"""A group lives on one host, and its sockets are nobody else's business."""


class Group(Protocol):
    rank: int
    size: int

    def add_up(self, share: Tensor) -> None:
        """Makes `share`, contiguous, the sum of all ranks' shares of the same shape: the same bits on each rank."""

    def gather(self, columns: Tensor, widths: Sequence[int]) -> Tensor:
        """On rank 0, all ranks' columns side by side, [rows, sum(widths)]; on the others, no rows of them. `columns` is
        [rows, widths[rank]]."""


class TorchGroup:
    """Implements `Group` by torch.distributed: gloo on CPU, NCCL on CUDA. One per process."""

    def __init__(self, rank: int, size: int, rendezvous: str, device: torch.device) -> None:
        """Returns when all ranks are here. `rendezvous` names a file that all of them share and that was empty. Raises
        `ConfigError` if they don't come together."""
        for name in SOCKETS:
            os.environ.setdefault(name, LOOPBACK)
        self.rank = rank
        self.size = size
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = distributed.FileStore(rendezvous, size)  # type: ignore[attr-defined]
        try:
            distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
        except RuntimeError as error:
            raise ConfigError(f"tensor_parallel: the {size} ranks don't come together by {backend}: {error}") from error

    def add_up(self, share: Tensor) -> None:
        with _ranks_gone():
            self._add_up(share)

    def _add_up(self, share: Tensor) -> None:
        if self.size == PAIR or share.device.type == "cuda":
            distributed.all_reduce(share)
            return
        # With more ranks, gloo adds in an order that depends on where in the tensor a value is: a row's result would
        # depend on the rows beside it.
        parts = [torch.empty_like(share) for _ in range(self.size)]
        distributed.all_gather(parts, share)
        torch.sum(torch.stack(parts), 0, out=share)

    def gather(self, columns: Tensor, widths: Sequence[int]) -> Tensor:
        padded = functional.pad(columns, (0, max(widths) - widths[self.rank])).contiguous()
        parts = [torch.empty_like(padded) for _ in widths] if self.rank == 0 else None
        with _ranks_gone():
            distributed.gather(padded, parts, dst=0)
        if parts is None:
            return columns.new_empty(0, sum(widths))
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], 1)


@contextmanager
def _ranks_gone() -> Iterator[None]:
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

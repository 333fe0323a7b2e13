"""Sums over the GPUs of one host by a kernel that reads all shares where they are: one launch for a decode step's few
rows, where NCCL takes several turns. It computes on the current stream, so that a CUDA graph may hold it.

After torch.distributed._symmetric_memory of torch 2.13: `one_shot_all_reduce_out` adds in the order of the ranks, so
that all of them get the same bits, and its last barrier is passed when nobody reads any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as distributed
from torch import Tensor

from cluster.config import Switch
from cluster.errors import ConfigError
from cluster.logging import get_logger

log = get_logger(__name__)

CAPACITY_BYTES: Final = 512 * 1024
"""Of one share: beyond it, each GPU reading all the others' costs more than NCCL's turns."""
ALIGNMENT_BYTES: Final = 16
"""Of what the kernel reads at once."""
DTYPES: Final = (torch.bfloat16, torch.float32)
"""That it knows."""

SumInto = Callable[[Tensor, Tensor], None]
"""Writes the sum of all ranks' first tensor, a part of what they share, into the second, of the same shape and type."""


class SymmetricSums:
    """`buffer`: bytes that all ranks see of each other. All methods are called by all ranks in the same order."""

    def __init__(self, buffer: Tensor, sum_into: SumInto) -> None:
        self._buffer = buffer
        self._sum_into = sum_into

    def takes(self, share: Tensor) -> bool:
        """Whether `add_up` is for it: the same on all ranks, whose shares are alike."""
        size = share.nbytes
        aligned = size % ALIGNMENT_BYTES == 0 and share.data_ptr() % ALIGNMENT_BYTES == 0
        return share.dtype in DTYPES and aligned and 0 < size <= self._buffer.nbytes

    def add_up(self, share: Tensor) -> None:
        """Makes `share`, contiguous, the sum over all ranks."""
        flat = share.view(-1)
        shared = self._buffer[: share.nbytes].view(share.dtype)
        shared.copy_(flat)
        self._sum_into(shared, flat)


def open_symmetric_sums(
    ranks: Any, device: torch.device, wanted: Switch, *, one_host: bool = True
) -> SymmetricSums | None:
    """For the torch.distributed group `ranks`, on a GPU each; all of them must ask. None where it can't be had, or is
    not wanted. Raises `ConfigError` where it must be had, and where GPUs can't do what they say."""
    if wanted is Switch.NEVER:
        return None
    possible = one_host and device.type == "cuda"
    if not possible or not _all_of(ranks, device, possible=_reaches_all(ranks, device)):
        if wanted is Switch.ALWAYS:
            raise ConfigError("model.symmetric_memory: always, and not all ranks' GPUs reach each other's memory")
        log.info("sums over ranks go by the collectives of torch", reason="not all GPUs reach each other's memory")
        return None
    import torch.distributed._symmetric_memory as symmetric_memory

    try:
        buffer = symmetric_memory.empty(CAPACITY_BYTES, dtype=torch.uint8, device=device)
        symmetric_memory.rendezvous(buffer, ranks)
    except RuntimeError as error:
        raise ConfigError(f"model.symmetric_memory: {error}; set it to never") from error

    def sum_into(shared: Tensor, out: Tensor) -> None:
        torch.ops.symm_mem.one_shot_all_reduce_out(shared, "sum", ranks.group_name, out)

    return SymmetricSums(buffer, sum_into)


def _reaches_all(ranks: Any, device: torch.device) -> bool:
    """Whether this GPU reaches those of the other ranks: of one host's, each rank has the one of its place."""
    own = device.index
    first = own - distributed.get_rank(ranks)
    others = [other for other in range(first, first + distributed.get_world_size(ranks)) if other != own]
    return all(torch.cuda.can_device_access_peer(own, other) for other in others)


def _all_of(ranks: Any, device: torch.device, *, possible: bool) -> bool:
    """Whether it is possible on all of them: they do it together or not at all."""
    word = torch.tensor([int(possible)], device=device)
    distributed.all_reduce(word, distributed.ReduceOp.MIN, group=ranks)
    return bool(word.item())

"""Sums by shared memory: what they are for, and that they are sums. The ranks are threads here, and the kernel is a sum
over what each of them has put where the others see it; `tests/gpu/test_symmetric_sums.py` has the real one."""

from __future__ import annotations

import threading

import pytest
import torch

from cluster.config import Switch
from cluster.errors import ConfigError
from engine.symmetric_sums import SymmetricSums, open_symmetric_sums

RANKS = 3
BYTES = 4096


class SharedMemory:
    """What the ranks see of each other."""

    def __init__(self) -> None:
        self.buffers = torch.zeros(RANKS, BYTES, dtype=torch.uint8)
        self._barrier = threading.Barrier(RANKS)

    def sums(self, rank: int) -> SymmetricSums:
        def sum_into(shared, out):
            self._barrier.wait()
            parts = self.buffers[:, : shared.nbytes].view(shared.dtype)
            total = parts.float().sum(0).to(out.dtype)
            self._barrier.wait()
            out.copy_(total)

        return SymmetricSums(self.buffers[rank], sum_into)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_one_after_the_other_become_their_sums(dtype):
    memory = SharedMemory()
    shares = torch.randint(-8, 8, (RANKS, 2, 3, 32)).to(dtype)
    expected = shares.sum(0)

    def run(rank):
        sums = memory.sums(rank)
        for share in shares[rank]:
            assert sums.takes(share)
            sums.add_up(share)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(RANKS):
        assert torch.equal(shares[rank], expected)


def test_what_is_too_large_or_of_another_type_or_not_aligned_goes_another_way():
    sums = SharedMemory().sums(0)
    whole = torch.zeros(BYTES // 4 + 4)
    assert sums.takes(whole[: BYTES // 4])
    assert not sums.takes(whole)
    assert not sums.takes(whole[:5]) and not sums.takes(whole[1:5]) and not sums.takes(whole[:0])
    assert not sums.takes(torch.zeros(8, dtype=torch.float16))


def test_a_cpu_has_none_nor_have_several_hosts_and_that_is_said_where_it_must_be_had():
    cpu = torch.device("cpu")
    assert open_symmetric_sums(None, cpu, Switch.NEVER) is None
    assert open_symmetric_sums(None, cpu, Switch.AUTO) is None
    with pytest.raises(ConfigError, match="symmetric_memory: always"):
        open_symmetric_sums(None, cpu, Switch.ALWAYS)
    with pytest.raises(ConfigError, match="symmetric_memory: always"):
        open_symmetric_sums(None, torch.device("cuda", 0), Switch.ALWAYS, one_host=False)

"""Pages in a GPU's memory go to another process's by NIXL: they arrive whole, and not by way of the host."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection

import pytest
import torch

from cluster.config import KV
from cluster.layout import KVLayout
from engine.kv_cache import KVCache
from engine.page_digests import DevicePageDigests
from kv_transfer.backends import open_backend
from kv_transfer.backends.base import PoolMemory, WriteState
from kv_transfer.shard_plan import PageSlice, Runs

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(300)]

GPU = "cuda:0"
LAYOUT = KVLayout("m", "bfloat16", page_size=16, layers=8, kv_heads=4, head_dim=128)
PAGES = 1024
"""Of a quarter of a megabyte."""
SECONDS = 60.0
ROUNDS = 5
LEAST_RATE = 20e9
"""Bytes a second. A copy within a device is ten times as fast; one by the host's memory and TCP, a tenth of it."""


class End:
    """One process's pool and transfer engine."""

    def __init__(self, name: str, device: str) -> None:
        self.cache = KVCache(LAYOUT, PAGES, torch.device(device))
        memory = PoolMemory(self.cache.address, PAGES, self.cache.page_bytes, self.cache.device)
        self.backend = open_backend(KV(), name, memory, "127.0.0.1")
        self.digests = DevicePageDigests(self.cache)


def receive(device: str, pipe: Connection) -> None:
    """The receiver's process: says where its pool is, then answers with digests of the pages that it is asked for."""
    end = End("receiver", device)
    pipe.send(end.backend.descriptor)
    while True:
        while not pipe.poll(0.001):
            end.backend.progress()
        asked = pipe.recv()
        if asked is None:
            break
        pages, runs = asked
        pipe.send(end.digests.of(pages, runs))
    end.backend.close()


def hand_over(device: str) -> float:
    """Raises what is wrong; returns the best rate of whole pages, in bytes a second."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=receive, args=(device, theirs), daemon=True)
    receiver.start()
    end = End("sender", device)
    generator = torch.Generator().manual_seed(1)
    end.cache.pool.copy_(torch.randn(end.cache.pool.shape, generator=generator))
    assert ours.poll(SECONDS)
    descriptor = ours.recv()

    def write(peer, sources, targets):
        begun = time.monotonic()
        handle = end.backend.write(peer, sources, targets)
        while (state := handle.poll()) is WriteState.PENDING and time.monotonic() < begun + SECONDS:
            pass
        assert state is WriteState.DONE
        return len(sources) * LAYOUT.page_bytes / (time.monotonic() - begun)

    def theirs_of(pages, runs=None):
        ours.send((pages, runs))
        assert ours.poll(SECONDS)
        return ours.recv()

    sources = list(range(0, PAGES - 1, 2))
    targets = [PAGES - 2 - source for source in sources]
    end.backend.connect("whole", descriptor)
    before = theirs_of(targets)
    rate = max(write("whole", sources, targets) for _ in range(ROUNDS))
    assert theirs_of(targets) == end.digests.of(sources) != before
    half = LAYOUT.page_bytes // 2
    part = PageSlice(Runs(half, half), Runs(0, half))
    end.backend.connect("part", descriptor, part)
    write("part", [1, 3], [5, 7])
    assert theirs_of([5, 7], part.theirs) == end.digests.of([1, 3], part.ours)
    ours.send(None)
    receiver.join(SECONDS)
    assert receiver.exitcode == 0
    end.backend.close()
    return rate


def test_pages_go_from_one_processs_device_memory_to_anothers_and_never_leave_the_device():
    assert hand_over(GPU) > LEAST_RATE

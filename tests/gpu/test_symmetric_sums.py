"""Sums over two GPUs by the memory that they share, against NCCL's; also from within a CUDA graph."""

from __future__ import annotations

import tempfile

import pytest
import torch

from cluster.config import Switch
from cluster.ranks import MeetingFile
from engine.group import TorchGroup

RANKS = 2
ROWS = (1, 4, 16)
HIDDEN = 4096

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs"),
    pytest.mark.timeout(300),
]


def compare(rank: int, meeting: str) -> None:
    """One rank, in a process of its own."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group = TorchGroup(rank, RANKS, MeetingFile(meeting), device)
    generator = torch.Generator(device).manual_seed(rank)
    shares = [torch.randn(rows, HIDDEN, device=device, generator=generator, dtype=torch.bfloat16) for rows in ROWS]
    by_nccl = [share.clone() for share in shares]
    for share in by_nccl:
        group.add_up(share)
    group.open_symmetric(device, Switch.ALWAYS)
    assert group._symmetric is not None and all(group._symmetric.takes(share) for share in shares)
    by_memory = [share.clone() for share in shares]
    for share in by_memory:
        group.add_up(share)
    for found, expected in zip(by_memory, by_nccl, strict=True):
        assert torch.equal(found, expected), "two terms have one sum"
    held = shares[-1].clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        group.add_up(held)
    for _ in range(3):
        held.copy_(shares[-1])
        graph.replay()
        assert torch.equal(held, by_nccl[-1])


def test_the_sums_are_those_of_nccl():
    with tempfile.NamedTemporaryFile() as meeting:
        torch.multiprocessing.spawn(compare, args=(meeting.name,), nprocs=RANKS)

"""Stages on GPUs of their own: hidden states, logits and KV go from one to the other by NCCL and NIXL."""

from __future__ import annotations

import pytest
import torch

from cluster.shards import Grid
from tests.process.engine_pair import expect_tokens_of_one, topology_of

SOON = 300.0

pytestmark = [pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"), pytest.mark.timeout(900)]


@pytest.mark.parametrize(
    ("prefill", "decode"), [(Grid(stages=2), Grid()), (Grid(), Grid(stages=2)), (Grid(stages=2), Grid(shards=2))]
)
async def test_stages_on_two_gpus_give_the_tokens_of_one(prefill, decode, tmp_path):
    await expect_tokens_of_one(topology_of(tmp_path / "model", "nixl", prefill, decode), tmp_path, SOON)

"""A model in parts: several ranks, as threads, give the logits of one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cluster.config import Dtype, Kernels
from cluster.errors import ConfigError
from engine.decoders import make_decoder
from engine.group import ThreadGroup, ThreadMeeting
from engine.shard import Shard, ShardedWeights
from engine.weights.base import parameter_shapes
from tests.unit.engine.test_native import SHAPES, RandomWeights, Sequences, cache_of, config_of

COUNTS = ({0: 70, 1: 5}, {0: 1, 1: 20, 2: 1}, {0: 1, 1: 1, 2: 1}, {1: 40, 0: 7, 2: 64})


def in_parts(config, ranks, kernels, dtype, steps):
    """The logits of all steps, by `ranks` threads."""
    meeting = ThreadMeeting(ranks)

    def compute(rank):
        shard = Shard(config, ThreadGroup(meeting, rank))
        cache = cache_of(shard.config, dtype, 16)
        with torch.inference_mode():
            decoder = make_decoder(kernels, config, RandomWeights(config), cache, 1, shard)
            return torch.cat([decoder.forward(step).clone() for step in steps])

    with ThreadPoolExecutor(ranks) as pool:
        found = list(pool.map(compute, range(ranks)))
    assert all(len(logits) == 0 for logits in found[1:]), "rank 0 alone has logits"
    return found[0]


@pytest.mark.parametrize(
    ("name", "ranks", "kernels"),
    [
        ("plain", 2, Kernels.NATIVE),
        ("plain", 3, Kernels.TORCH),
        ("plain", 5, Kernels.NATIVE),
        ("many heads share keys, odd sizes", 3, Kernels.NATIVE),
        ("many heads share keys, odd sizes", 2, Kernels.TORCH),
        ("large heads", 2, Kernels.NATIVE),
        ("large heads", 3, Kernels.NATIVE),
        ("heads of 80, biases, norms of queries", 2, Kernels.NATIVE),
        ("heads of 80, biases, norms of queries", 3, Kernels.TORCH),
        ("a window", 4, Kernels.NATIVE),
    ],
)
def test_ranks_together_give_the_logits_of_one(name, ranks, kernels):
    config = config_of(**SHAPES[name])
    if ranks > config.heads:
        with pytest.raises(ConfigError, match=f"{ranks} ranks can't share the model's {config.heads} query heads"):
            Shard(config, ThreadGroup(ThreadMeeting(ranks), 0))
        return
    sequences = Sequences(16, count=3, longest=130)
    steps = [sequences.step(counts) for counts in COUNTS]
    with torch.inference_mode():
        whole = make_decoder(kernels, config, RandomWeights(config), cache_of(config, Dtype.FLOAT32, 16), 1)
        alone = torch.cat([whole.forward(step).clone() for step in steps])
    torch.testing.assert_close(in_parts(config, ranks, kernels, Dtype.FLOAT32, steps), alone, atol=4e-4, rtol=2e-4)


def test_tied_embeddings_are_divided_once():
    config = config_of(tied_embeddings=True)
    steps = [Sequences(16, count=1).step({0: 30})]
    with torch.inference_mode():
        whole = make_decoder(
            Kernels.TORCH, config, RandomWeights(config), cache_of(config, Dtype.FLOAT32, 16), 1
        ).forward(steps[0])
    parts = in_parts(config, 2, Kernels.NATIVE, Dtype.FLOAT32, steps)
    torch.testing.assert_close(parts, whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_each_rank_has_its_part_and_shares_only_the_keys_that_are_too_few(ranks):
    config = config_of(**SHAPES["heads of 80, biases, norms of queries"])
    whole = parameter_shapes(config)
    shards = [
        ShardedWeights(RandomWeights(config), Shard(config, ThreadGroup(ThreadMeeting(ranks), rank)))
        for rank in range(ranks)
    ]
    for name, shape in whole.items():
        parts = [shard.read(name) for shard in shards]
        assert [tuple(part.shape) for part in parts] == [shard.shapes()[name] for shard in shards]
        values = sum(part.numel() for part in parts)
        if name.endswith(("norm.weight", "o_proj.bias", "down_proj.bias")):
            assert values == ranks * shape[0], "whole on each rank"
        elif "k_proj" in name or "v_proj" in name:
            assert values == torch.Size(shape).numel() * max(ranks, config.kv_heads) // config.kv_heads
        else:
            assert values == torch.Size(shape).numel(), "divided"
    added = [shard.read("model.layers.0.mlp.down_proj.bias").abs().sum().item() for shard in shards]
    assert added[0] > 0 and not any(added[1:]), "a sum over ranks has its bias once"

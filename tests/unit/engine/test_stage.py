"""A model whose layers are divided: stages of shards, as threads, give the logits of one, several steps under way."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cluster.config import Dtype, Kernels
from cluster.errors import ConfigError
from cluster.ranks import Frames, RankGone
from cluster.shards import Grid
from engine.decoders import make_decoder
from engine.followers import Follower, LeadingDecoder
from engine.group import ThreadGroup, ThreadMeeting
from engine.line import ThreadLine, ThreadPipes
from engine.shard import Shard, ShardedWeights
from engine.stage import Stage, StageWeights
from engine.weights.base import parameter_shapes
from tests.unit.engine.test_native import SHAPES, RandomWeights, Sequences, cache_of, config_of

GRIDS = [Grid(stages=2), Grid(stages=3), Grid(shards=2, stages=2), Grid(shards=3, stages=2)]
COUNTS = ({0: 70, 1: 5}, {0: 1, 1: 20, 2: 1}, {2: 30}, {0: 1, 1: 1, 2: 1}, {1: 40, 0: 7, 2: 64})
NOTHING = torch.zeros(0, dtype=torch.int64).numpy()


class Ranks:
    """Those of one worker as threads. Rank 0 is the caller's."""

    def __init__(self, config, grid, kernels):
        self.config, self.grid, self.kernels = config, grid, kernels
        self.pipes = ThreadPipes(grid)
        self.meetings = [ThreadMeeting(grid.shards) for _ in range(grid.stages)]

    def decoder(self, rank):
        stage = Stage(self.config, ThreadLine(self.pipes, rank))
        shard = None
        if self.grid.shards > 1:
            meeting = self.meetings[self.grid.stage_of(rank)]
            shard = Shard(stage.config, ThreadGroup(meeting, self.grid.shard_of(rank)))
        cache = cache_of((shard or stage).config, Dtype.FLOAT32, 16)
        weights = RandomWeights(self.config)
        return make_decoder(self.kernels, self.config, weights, cache, 1, shard, stage=stage), stage.line

    def follow(self, rank, leader):
        decoder, line = self.decoder(rank)
        with contextlib.suppress(RankGone):
            Follower(decoder, leader, line).run()

    def compute(self, steps):
        """The logits of all steps; as many are begun as there are stages before the first is asked for."""
        ends = [[Frames(end) for end in socket.socketpair()] for _ in range(1, self.grid.ranks)]
        with ThreadPoolExecutor(self.grid.ranks) as pool:
            followers = [pool.submit(self.follow, rank, ends[rank - 1][1]) for rank in range(1, self.grid.ranks)]
            with torch.inference_mode():
                decoder, line = self.decoder(0)
                lead = LeadingDecoder(decoder, [ours for ours, _ in ends], line)
                lead.warm_up(0, 128, 4, 128)
                found, under_way = [], deque()
                for step in steps:
                    under_way.append(lead.begin(step, lambda: None))
                    if len(under_way) == lead.stages:
                        found.append(under_way.popleft()())
                found += [answer() for answer in under_way]
            for ours, _ in ends:
                ours.close()
            for follower in followers:
                follower.result(10)
            for _, theirs in ends:
                theirs.close()
        return found


def expect_logits_of_one(config, grid, kernels):
    sequences = Sequences(16, count=3, longest=130)
    steps = [sequences.step(counts) for counts in COUNTS]
    steps[2] = steps[2]._replace(sampled=NOTHING)
    with torch.inference_mode():
        whole = make_decoder(kernels, config, RandomWeights(config), cache_of(config, Dtype.FLOAT32, 16), 1)
        alone = [whole.forward(step).clone() for step in steps]
    for one, other in zip(Ranks(config, grid, kernels).compute(steps), alone, strict=True):
        torch.testing.assert_close(one, other, atol=4e-4, rtol=2e-4)


@pytest.mark.parametrize("kernels", [Kernels.NATIVE, Kernels.TORCH])
@pytest.mark.parametrize("grid", GRIDS)
def test_stages_together_give_the_logits_of_one(grid, kernels):
    expect_logits_of_one(config_of(layers=4, windows=(None, 21, None, 9)), grid, kernels)


@pytest.mark.parametrize("name", SHAPES)
def test_any_family_can_be_divided(name):
    expect_logits_of_one(config_of(**SHAPES[name]), Grid(stages=2), Kernels.AUTO)


@pytest.mark.parametrize("kernels", [Kernels.NATIVE, Kernels.TORCH])
def test_a_tied_head_is_the_last_stages_own(kernels):
    expect_logits_of_one(config_of(tied_embeddings=True), Grid(2, 2), kernels)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match="pipeline_parallel: 3 stages can't share the model's 2 layers"):
        Stage(config_of(layers=2), ThreadLine(ThreadPipes(Grid(stages=3)), 0))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_each_parameter_is_read_by_those_that_have_it(grid, tied):
    """And by nobody else: a model that exceeds a host is never whole on one."""
    config = config_of(layers=5, windows=(None,) * 5, tied_embeddings=tied)
    read = dict.fromkeys(parameter_shapes(config), 0)
    ranks = Ranks(config, grid, Kernels.TORCH)
    for rank in range(grid.ranks):
        stage = Stage(config, ThreadLine(ranks.pipes, rank))
        weights = StageWeights(Counting(config, read), stage)
        shard = Shard(stage.config, ThreadGroup(ThreadMeeting(grid.shards), grid.shard_of(rank)))
        for name in ShardedWeights(weights, shard).shapes():
            weights.read(name)
        assert {name.split(".")[2] for name in weights.shapes() if ".layers." in name} == {
            str(layer) for layer in range(len(stage.layers))
        }
    twice = {"model.embed_tokens.weight"} if tied else set()
    assert all(count == grid.shards * (2 if name in twice else 1) for name, count in read.items())


class Counting(RandomWeights):
    """Notes what is read."""

    def __init__(self, config, read):
        super().__init__(config)
        self._read = read

    def read(self, name, part=None):
        self._read[name] += 1
        return super().read(name, part)

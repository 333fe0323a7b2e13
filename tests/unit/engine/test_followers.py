"""Rank 0 leads the others through its steps, and through those that it computes within a step."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
import torch

from cluster.config import Dtype, Kernels
from cluster.ranks import Frames, RankGone
from engine.decoders import make_decoder
from engine.followers import Follower, LeadingDecoder, RunStep
from engine.group import ThreadGroup, ThreadMeeting
from engine.shard import Shard
from tests.unit.engine.test_native import RandomWeights, Sequences, cache_of, config_of

CONFIG = config_of(layers=3, windows=(None, 21, None))


def decoder_of(meeting, rank):
    shard = Shard(CONFIG, ThreadGroup(meeting, rank))
    cache = cache_of(shard.config, Dtype.FLOAT32, 16)
    return make_decoder(Kernels.NATIVE, CONFIG, RandomWeights(CONFIG), cache, 1, shard)


@pytest.fixture
def lead():
    """Rank 0 of two; the other follows on a thread that ends with rank 0."""
    ours, theirs = (Frames(end) for end in socket.socketpair())
    meeting = ThreadMeeting(2)
    ended = threading.Event()

    def follow():
        with contextlib.suppress(RankGone):
            Follower(decoder_of(meeting, 1), theirs).run()
        theirs.close()
        ended.set()

    threading.Thread(target=follow, daemon=True).start()
    with torch.inference_mode():
        yield LeadingDecoder(decoder_of(meeting, 0), [ours])
    ours.close()
    assert ended.wait(10)


def test_a_step_within_a_step_is_computed_by_all_ranks(lead):
    sequences = Sequences(16, count=3)
    outer, inner, later = sequences.step({0: 70}), sequences.step({1: 120}), sequences.step({0: 1, 1: 1})
    whole = make_decoder(Kernels.NATIVE, CONFIG, RandomWeights(CONFIG), cache_of(CONFIG, Dtype.FLOAT32, 16), 1)
    alone = [whole.forward(step).clone() for step in (outer, inner, later)]
    layers, found = [], []

    def between_layers():
        layers.append(1)
        if len(layers) == 2:
            found.append(lead.forward(inner).clone())

    lead.warm_up(0, 128, 4, 128)
    of_outer = lead.forward(outer, between_layers).clone()
    for one, other in zip((of_outer, *found, lead.forward(later)), alone, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def test_a_step_arrives_as_it_was():
    sequences = Sequences(16, count=3)
    sequences.step({0: 20, 2: 5})
    step = sequences.step({2: 3, 0: 17, 1: 1})._replace(sampled=torch.zeros(0, dtype=torch.int64).numpy())
    again = RunStep.of(step, pauses=True).step()
    assert again.spans == step.spans
    for name in ("tokens", "positions", "sampled"):
        one, other = getattr(again, name), getattr(step, name)
        assert one.dtype == other.dtype and one.tolist() == other.tolist()

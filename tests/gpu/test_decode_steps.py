"""Decode steps on a GPU: graphs give the logits of steps without them, steps launched ahead the tokens of plain ones,
and launching one waits for nothing."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import LlamaConfig

from cluster.config import Device, Dtype, Switch
from engine.attention.base import Span
from engine.batch import build_step
from engine.graphed_decoder import GraphedDecoder
from engine.scheduler import Chunk
from tests.unit.engine.tiny import SIZES, make_engine, make_model, prompts, sequence

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.timeout(900)]

HEADS_OF_64 = {"hidden_size": 384, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 2}
LENGTHS = (1, 3, 16, 17, 40, 65, 130)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(LlamaConfig(**SIZES | HEADS_OF_64)).save_pretrained(path)
    return path


def gpu_engine(folder, **settings):
    engine = make_engine(folder, device=Device.CUDA, dtype=Dtype.BFLOAT16, page_size=16, prefix_cache=False, **settings)
    engine.warm_up()
    return engine


@contextlib.contextmanager
def no_waiting():
    """Raises where torch would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphs_give_the_logits_of_steps_without_them(folder):
    engine = gpu_engine(folder, graphs=Switch.ALWAYS)
    decoder = engine._decoder
    assert isinstance(decoder, GraphedDecoder)
    inner = decoder._inner
    live = []
    for number, prompt in enumerate(prompts(*LENGTHS)):
        one = sequence(number, prompt, 60)
        one.pages = list(range(10 * number, 10 * number + 10))
        live.append(one)
    with torch.inference_mode():
        decoder.forward(build_step([Chunk(one, 0, one.length - 1) for one in live if one.length > 1]))
        for count in (7, 7, 5, 4, 3, 2, 1):
            step = build_step([Chunk(one, one.length - 1, one.length) for one in live[:count]])
            # Both write the same KV to the same places.
            expected = inner.forward(step).clone()
            found = decoder.forward(step).clone()
            assert (found - expected).norm() < 0.02 * expected.norm()
            for one, token in zip(live, found.argmax(-1).tolist(), strict=False):
                one.output.append(token)


@pytest.mark.parametrize("graphs", [Switch.NEVER, Switch.ALWAYS])
def test_steps_launched_ahead_give_the_tokens_of_plain_ones(folder, graphs):
    """All answers are of the same length, so that batches are the same, and with them the rounding."""

    def answers(ahead):
        engine, found = gpu_engine(folder, graphs=graphs, ahead=ahead), {}
        for number, prompt in enumerate(prompts(*LENGTHS)[:6]):
            settings = {"temperature": number % 2, "top_p": 0.9, "presence_penalty": 0.3 * (number % 3)}
            engine.submit(sequence(number, prompt[:16], 24, **settings))
            found[number] = []
        while result := engine.step():
            for sampled in result.sampled:
                found[sampled.key].append(sampled.token)
        return found

    assert answers(Switch.ALWAYS) == answers(Switch.NEVER)


@pytest.mark.parametrize("graphs", [Switch.NEVER, Switch.ALWAYS])
def test_launching_a_step_waits_for_nothing(folder, graphs):
    engine = gpu_engine(folder, graphs=graphs, ahead=Switch.ALWAYS)
    for number, prompt in enumerate(prompts(*LENGTHS)[:6]):
        settings = {"temperature": number % 2, "top_p": 0.9, "top_k": 5 * (number % 3), "logprobs": number % 4}
        engine.submit(sequence(number, prompt[:16], 24, presence_penalty=0.3, **settings))
    for _ in range(6):
        engine.step()
    for _ in range(4):
        plan = engine.plan()
        with no_waiting():
            launched = engine._launch(plan, lambda: None)
        engine._under_way.append(launched)
        engine._read(engine._under_way.popleft())


def test_padding_writes_to_no_page_of_the_ledger(folder):
    engine = gpu_engine(folder, graphs=Switch.ALWAYS)
    pool = engine._cache.pool
    pool.zero_()
    one = sequence("a", [1], 9)
    one.pages = [3]
    step = build_step([Chunk(one, 0, 1)] * 3)
    assert step.spans[0] == Span(0, 0, 1, [3])
    with torch.inference_mode():
        engine._decoder.forward(step)
    written = pool[: engine.ledger.total].flatten(1).any(-1).nonzero().flatten().tolist()
    assert written == [3]

"""Decode steps out of memory that stays, as a CUDA graph computes them. What is recorded here is the computation
itself, and replaying it does it again: it sees nothing of a step but what was written to that memory before."""

from __future__ import annotations

import pytest
import torch

from cluster.config import Kernels, Switch
from cluster.errors import ConfigError
from engine import decoders, torch_decoder
from engine.attention.flashinfer_paged import FlashInferAttention
from engine.graphed_decoder import GraphedDecoder, graph_sizes
from engine.torch_decoder import TorchDecoder
from tests.unit.engine.fake_flashinfer import FakeFlashInfer
from tests.unit.engine.tiny import MODELS, make_engine, make_model, prompts, run, sequence

FAMILIES = ("llama", "mistral with a sliding window")
LENGTHS = (1, 3, 5, 16, 17, 33)


class Recorder:
    """Keeps computations; tells which of them were done again, by their order."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed: list[int] = []

    def record(self, compute):
        compute()
        number = self.recorded
        self.recorded += 1

        def replay():
            self.replayed.append(number)
            compute()

        return replay


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def flashinfer(monkeypatch):
    """Engines have its attention."""
    monkeypatch.setattr(
        torch_decoder,
        "make_attention",
        lambda wanted, cache, heads, windows: FlashInferAttention(cache, heads, windows, FakeFlashInfer(), 0),
    )


@pytest.fixture
def graphed(monkeypatch, recorder, flashinfer):
    """And graphs."""
    monkeypatch.setattr(
        decoders, "with_graphs", lambda decoder, wanted: GraphedDecoder(decoder, recorder.record, required=True)
    )


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(MODELS[request.param]).save_pretrained(path)
    return path


def asked():
    for number, prompt in enumerate(prompts(*LENGTHS)):
        yield sequence(number, prompt, 6 + 2 * number, temperature=number % 2, stop_token_ids=[number, 60 + number])


def warm_engine(folder, **settings):
    engine = make_engine(folder, kernels=Kernels.TORCH, max_running=5, **settings)
    engine.warm_up()
    return engine


@pytest.mark.parametrize("ahead", [Switch.NEVER, Switch.ALWAYS])
def test_a_graphed_decoder_gives_the_same_tokens(folder, recorder, request, ahead):
    plain = warm_engine(folder)
    expected = run(plain, *asked())
    request.getfixturevalue("graphed")
    engine = warm_engine(folder, ahead=ahead)
    assert recorder.recorded == len(graph_sizes(5))
    recorder.replayed.clear()
    assert run(engine, *asked()) == expected
    # The largest was recorded first: 8, 4, 2, 1. A batch of 5, 4 or 3, of 2, and of 1 took part.
    assert set(recorder.replayed) >= {0, 1, 3}


def test_padding_leaves_the_ledgers_pages_alone(folder, recorder, flashinfer, request):
    """All of them hold what steps without padding have put there."""

    def pool(engine):
        for number, prompt in enumerate(prompts(7, 9, 2)):
            engine.submit(sequence(number, prompt, 9))
        while engine.step():
            pass
        return engine._cache.pool[: engine.ledger.total]

    expected = pool(warm_engine(folder, prefix_cache=False))
    request.getfixturevalue("graphed")
    torch.testing.assert_close(pool(warm_engine(folder, prefix_cache=False)), expected, atol=1e-5, rtol=1e-4)
    assert 1 in recorder.replayed, "three sequences, as four"


def test_what_is_not_decoding_alone_is_computed_as_ever(folder, recorder, graphed):
    engine = warm_engine(folder)
    recorder.replayed.clear()
    engine.submit(sequence("short", *prompts(5), 8))
    assert engine.step().sampled
    assert not recorder.replayed, "a prompt"
    assert engine.step().sampled
    assert len(recorder.replayed) == 1
    engine.submit(sequence("long", *prompts(40), 8))
    engine.step()
    assert len(recorder.replayed) == 1, "a decode beside a prompt's chunk"


def test_between_two_layers_is_once_in_a_graph(folder, graphed):
    engine = warm_engine(folder)
    engine.submit(sequence("a", *prompts(5), 8))
    calls = []
    engine.execute(engine.plan(), lambda: calls.append("layer"))
    assert len(calls) == 3
    engine.execute(engine.plan(), lambda: calls.append("step"))
    assert calls.count("step") == 1


def test_sizes_are_few():
    assert graph_sizes(1) == [1]
    assert graph_sizes(5) == [1, 2, 4, 8]
    assert graph_sizes(64) == [1, 2, 4, *range(8, 65, 8)]
    assert graph_sizes(200)[-2:] == [192, 208]
    assert graph_sizes(100_000)[-1] == 512


class TestWithout:
    """Where there can be no graphs."""

    @pytest.fixture
    def decoder(self, folder):
        engine = make_engine(folder, kernels=Kernels.TORCH)
        assert isinstance(engine._decoder, TorchDecoder)
        return engine._decoder

    def test_a_cpu_refuses_them_if_they_must_be(self, decoder):
        assert decoders.with_graphs(decoder, Switch.AUTO) is decoder
        assert decoders.with_graphs(decoder, Switch.NEVER) is decoder
        with pytest.raises(ConfigError, match="one GPU has to itself, not cpu"):
            decoders.with_graphs(decoder, Switch.ALWAYS)

    def test_torchs_attention_can_not_be_recorded(self, decoder, recorder):
        with pytest.raises(ConfigError, match="only flashinfer's attention"):
            GraphedDecoder(decoder, recorder.record, required=True).warm_up(0, 8, 8, 64)
        GraphedDecoder(decoder, recorder.record).warm_up(0, 8, 8, 64)
        assert recorder.recorded == 0

    def test_what_can_not_be_recorded_is_computed_as_ever(self, folder, monkeypatch, request):
        def refuse(compute):
            raise RuntimeError("operation not permitted when stream is capturing")

        expected = run(warm_engine(folder), *asked())
        request.getfixturevalue("graphed")
        monkeypatch.setattr(decoders, "with_graphs", lambda decoder, wanted: GraphedDecoder(decoder, refuse))
        assert run(warm_engine(folder), *asked()) == expected

"""Steps that are launched before the one before them has been read: the same answers, and pages that are nobody else's
as long as a step writes to them."""

from __future__ import annotations

import pytest
import torch

from cluster.config import Kernels, Switch
from cluster.errors import ConfigError
from cluster.messages import FinishReason
from cluster.ranks import ALONE, Rank
from engine import engine as engine_module
from engine.decoder import Unread
from engine.sampler import draw
from engine.transit import ToHost
from tests.unit.engine.tiny import MODELS, VOCABULARY, make_engine, make_model, prompts, sequence

MANY_STOPS = list(range(0, VOCABULARY, 9))
LENGTHS = (1, 3, 4, 15, 16, 17, 40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(MODELS["llama"]).save_pretrained(path)
    return path


def asked():
    """Answers that end by their limits and by stop tokens, greedy and sampled, with all that sampling may look at."""
    for number, prompt in enumerate(prompts(*LENGTHS)):
        yield sequence(("greedy", number), prompt, 20)
        yield sequence(("stops", number), prompt, 30, stop_token_ids=MANY_STOPS)
        yield sequence(("sampled", number), prompt, 1 + number, temperature=1.0, top_p=0.9, top_k=30, logprobs=2)
        yield sequence(
            ("penalized", number), prompt, 25, temperature=0.8, presence_penalty=0.7, frequency_penalty=0.3,
            stop_token_ids=MANY_STOPS[::3], logprobs=0,
        )  # fmt: skip
        yield sequence(("repeats", number), prompt, 25, frequency_penalty=-0.4, output=[7, 7])


def answers(engine):
    """Of each request (offset, token, end), in the order in which they come; and all logprobs by request and offset."""
    found, logprobs = {}, {}
    for one in asked():
        found[one.key] = []
        engine.submit(one)
    while result := engine.step():
        for sampled in result.sampled:
            found[sampled.key].append((sampled.offset, sampled.token, sampled.finished))
            if sampled.logprobs is not None:
                best = [value for _, value in sampled.logprobs.top]
                logprobs[sampled.key, sampled.offset] = [sampled.logprobs.chosen, *best]
            if sampled.finished:
                engine.release(sampled.key)
    engine.ledger.check()
    engine.prefixes.check()
    assert engine.pages_used == 0
    return found, logprobs


@pytest.fixture(scope="module")
def expected(folder):
    return answers(make_engine(folder, kernels=Kernels.TORCH))


@pytest.mark.parametrize("kernels", [Kernels.TORCH, Kernels.AUTO])
def test_answers_are_those_of_plain_steps(folder, kernels, expected):
    found, logprobs = answers(make_engine(folder, kernels=kernels, ahead=Switch.ALWAYS))
    assert found == expected[0]
    assert {answer[-1][-1] for answer in found.values()} == {FinishReason.STOP, FinishReason.LENGTH}
    assert logprobs.keys() == expected[1].keys()
    for place, values in logprobs.items():
        assert values == pytest.approx(expected[1][place], abs=1e-4)


def test_a_step_is_launched_before_the_one_before_it_is_read(folder, monkeypatch):
    engine, log = make_engine(folder, kernels=Kernels.TORCH, ahead=Switch.ALWAYS), []
    forward, read = engine._decoder.forward, ToHost.read
    monkeypatch.setattr(engine._decoder, "forward", lambda *step: log.append("launch") or forward(*step))
    monkeypatch.setattr(ToHost, "read", lambda tensors: log.append("read") or read(tensors))
    engine.submit(sequence("a", *prompts(5), 4))
    while engine.step():
        pass
    assert log == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]


def test_who_leaves_keeps_its_pages_until_the_step_under_way_is_read(folder):
    engine = make_engine(folder, ahead=Switch.ALWAYS, prefix_cache=False)
    asked = prompts(5, 6)
    for key, prompt in zip("ab", asked, strict=True):
        engine.submit(sequence(key, prompt, 4))
    assert engine.compute(engine.plan()) is None
    held = engine.pages_used
    assert engine.cancel("a")
    engine.release("a")
    assert engine.pages_used == held
    result = engine.compute(engine.plan())
    assert [one.key for one in result.sampled] == ["b"], "its token is dropped"
    assert 0 < engine.pages_used < held


def test_a_stop_token_is_the_last_one_though_a_step_has_gone_on_behind_it(folder):
    (prompt,) = prompts(6)
    plain = make_engine(folder)
    plain.submit(sequence("a", prompt, 10))
    tokens = [plain.step().sampled[0].token for _ in range(10)]
    engine = make_engine(folder, ahead=Switch.ALWAYS)
    engine.submit(sequence("a", prompt, 10, stop_token_ids=[tokens[3]]))
    results = [engine.step() for _ in range(tokens.index(tokens[3]) + 1)]
    assert results[-1].sampled[0].finished is FinishReason.STOP
    engine.release("a")
    assert engine.pages_used > 0, "a step still writes there"
    assert engine.step().sampled == []
    assert engine.pages_used == 0
    assert engine.step() is None


def test_penalties_count_a_token_that_nobody_has_read():
    def rows(outputs):
        settings = {"presence_penalty": 0.3, "frequency_penalty": 0.45}
        return [sequence(number, [1], 90, output=output, **settings) for number, output in enumerate(outputs)]

    outputs = [[3], [3, 3, 8], [5, 8, 5], [], [9, 9, 2]]
    read, unread = (
        rows(outputs),
        rows([output[:-1] if number != 2 else output for number, output in enumerate(outputs)]),
    )
    for number in (0, 1, 4):
        unread[number].unread = 1
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    expected, found = logits.clone(), logits.clone()
    draw(expected, read)
    sources = torch.tensor([0, 2, -1, -1, 1]).numpy()
    draw(found, unread, Unread(torch.tensor([3, 2, 8]), sources))
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits)


def test_it_is_for_one_gpu():
    is_ahead, several = engine_module._is_ahead, Rank(size=2)
    assert is_ahead(Switch.AUTO, "cuda:0", ALONE)
    assert not is_ahead(Switch.AUTO, "cpu", ALONE)
    assert not is_ahead(Switch.AUTO, "cuda:0", several)
    assert not is_ahead(Switch.NEVER, "cuda:0", ALONE)
    assert is_ahead(Switch.ALWAYS, "cpu", ALONE)
    with pytest.raises(ConfigError, match="one of several ranks"):
        is_ahead(Switch.ALWAYS, "cuda:0", several)

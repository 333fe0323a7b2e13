"""No way of scheduling changes a token: cache, chunks, policies, pacing, estimates and retraction, one by one."""

from __future__ import annotations

import pytest
import torch

from cluster.config import SchedulingPolicy, Switch
from tests.unit.engine.tiny import MODELS, make_engine, make_model, prompts, sequence

NEW_TOKENS = 44
"""More than an entry commits to at least, so that pages can run short."""
LENGTHS = (1, 3, 4, 5, 15, 16, 17, 33, 150)
SAMPLED = range(0, len(LENGTHS), 2)
"""Of these prompts a second, sampled answer is asked, with penalties and a seed."""

MODES = {
    **{policy.value: {"policy": policy} for policy in SchedulingPolicy},
    "retraction at each step": {"retract_every_steps": 1},
    "retraction at each third step": {"retract_every_steps": 3},
    "half conservative": {"conservativeness": 0.5},
    "conservative": {"conservativeness": 1.0},
    "delayed prefills": {"prefill_delay_seconds": 0.02},
    "too few pages": {"commit_quantile": 0.0, "pool_pages": 70},
    "everything": {
        "policy": SchedulingPolicy.SHORTEST_FIRST, "retract_every_steps": 4, "conservativeness": 0.7,
        "prefill_delay_seconds": 0.05, "commit_quantile": 0.5, "pool_pages": 80,
    },
    "ahead": {"ahead": Switch.ALWAYS},
    "ahead, with retractions": {
        "ahead": Switch.ALWAYS, "retract_every_steps": 3, "conservativeness": 0.7, "commit_quantile": 0.5,
        "pool_pages": 80,
    },
}  # fmt: skip
LAYOUTS = [(True, 16), (True, 2048), (False, 64), (False, 2048)]
"""Of (prefix cache, chunk_tokens)."""


class Run:
    """All requests of the test on one engine, retracted ones submitted again; a step takes 10 ms."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.now = 0.0
        self.retractions = 0
        self.answers: dict[str, list[int]] = {}
        self._live: dict[str, object] = {}

    def ask(self, name: str, prompt: list[int], *, attempt: int = 1, max_tokens: int = NEW_TOKENS, **sampling) -> None:
        output = self.answers.setdefault(name, [])
        key = f"{name}#{attempt}"
        one = sequence(key, prompt, max_tokens, output=output, **sampling)
        one.arrived, one.attempt, one.priority = self.now, attempt, len(prompt) % 7
        self._live[key] = (name, prompt, {"max_tokens": max_tokens, **sampling})
        self.engine.submit(one)

    def until_idle(self) -> dict[str, list[int]]:
        for _ in range(5000):
            if not self._live:
                break
            self._step()
        while (rest := self.engine.step(self.now)) is not None:  # behind a stop token
            assert not rest.sampled
        self.engine.ledger.check()
        self.engine.prefixes.check()
        assert self.engine.pages_used == 0 and not self._live
        return self.answers

    def _step(self) -> None:
        while (key := self.engine.retract()) is not None:
            self.engine.release(key)
            self.retractions += 1
            name, prompt, sampling = self._live.pop(key)
            self.ask(name, prompt, attempt=int(key.partition("#")[2]) + 1, **sampling)
        self.now += 0.01
        result = self.engine.step(self.now)
        for sampled in result.sampled if result else ():
            name = self._live[sampled.key][0]
            assert sampled.offset == len(self.answers[name]), "each token once"
            self.answers[name].append(sampled.token)
            if sampled.finished:
                self.engine.release(sampled.key)
                del self._live[sampled.key]


def ask_all(run: Run) -> None:
    asked = prompts(*LENGTHS)
    for number, prompt in enumerate(asked):
        run.ask(f"greedy {number}", prompt)
    for number in SAMPLED:
        run.ask(f"sampled {number}", asked[number], temperature=1.0, top_p=0.9, presence_penalty=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(MODELS["qwen3"]).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(folder):
    """Plainly scheduled, one by one; greedy ones as transformers says."""
    run = Run(make_engine(folder, prefix_cache=False, max_running=1, chunk_tokens=256))
    ask_all(run)
    answers = run.until_idle()
    model = make_model(MODELS["qwen3"])
    for number, prompt in enumerate(prompts(*LENGTHS)):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
            )
        assert answers[f"greedy {number}"] == whole[0, len(prompt) :].tolist()
    return answers


@pytest.mark.parametrize(("cache", "chunk_tokens"), LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_plain_scheduling(folder, expected, mode, cache, chunk_tokens):
    run = Run(make_engine(folder, prefix_cache=cache, chunk_tokens=chunk_tokens, **MODES[mode]))
    if "commit_quantile" in MODES[mode]:
        teach_short_answers(run)
    ask_all(run)
    answers = run.until_idle()
    assert {name: answers[name] for name in expected} == expected
    assert (run.retractions > 0) is ("retract_every_steps" in MODES[mode] or "pool_pages" in MODES[mode])


def teach_short_answers(run: Run) -> None:
    """So that an engine which goes by estimates takes on more than its pool will hold."""
    for number in range(20):
        run.ask(f"short {number}", [number], stop_token_ids=list(range(128)))
    run.until_idle()


def test_with_pages_enough_nothing_is_retracted(folder):
    run = Run(make_engine(folder, commit_quantile=0.0))
    teach_short_answers(run)
    ask_all(run)
    run.until_idle()
    assert run.retractions == 0

"""Both loops and the router's machine together, in too small a pool: requests are interrupted and nobody can tell."""

from __future__ import annotations

import random

import pytest

from cluster.config import SchedulingPolicy, Switch
from cluster.engine_messages import FromRouter
from cluster.messages import (
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    FinishReason,
    Role,
    Sampling,
)
from router.request_state import (
    Cancel,
    Deliver,
    Dispatch,
    Fail,
    Finish,
    LegFinished,
    LegStarted,
    PlaceAgain,
    Placed,
    RequestMachine,
    TokensArrived,
    WorkerKey,
)
from tests.unit.workers.pair import DECODE_EPOCH, PREFILL_EPOCH, ROUTER, Pair, tiny_engine

PREFILL, DECODE = WorkerKey("prefill", PREFILL_EPOCH), WorkerKey("decode", DECODE_EPOCH)


class Requests:
    """A router without sockets: one machine a request, all on the same pair."""

    def __init__(self, pair: Pair, *, unified: bool) -> None:
        self.pair = pair
        self.answers: dict[str, list[int]] = {}
        self.ends: dict[str, FinishReason] = {}
        self.attempts: dict[str, int] = {}
        self._placed = Placed(None if unified else PREFILL, DECODE)
        self._machines: dict[str, RequestMachine] = {}
        self._heard: dict[object, int] = {}

    def ask(self, name: str, prompt: list[int], sampling: Sampling, *, priority: int = 0) -> None:
        self.answers[name] = []
        self._machines[name] = RequestMachine(name, prompt, sampling, priority)
        self._feed(name, self._placed)

    def until_idle(self, turns: int = 4000) -> dict[str, list[int]]:
        for _ in range(turns):
            self.pair.turn()
            self._listen()
            if len(self.ends) == len(self.answers):
                break
        self.pair.settle()
        self.pair.assert_nothing_left()
        assert len(self.ends) == len(self.answers)
        return self.answers

    def _listen(self) -> None:
        for fence, words in list(self.pair.router.items()):
            for word in words[self._heard.get(fence, 0) :]:
                machine = self._machines[fence.request]
                if machine.fence == fence:
                    self._feed(fence.request, _event(word))
            self._heard[fence] = len(words)

    def _feed(self, name: str, event: object) -> None:
        machine = self._machines[name]
        for action in machine.handle(event, self.pair.clock.now()):
            if isinstance(action, Dispatch | Cancel):
                message = action.attempt if isinstance(action, Dispatch) else action.message
                wire = self.pair.to_prefill if action.role is Role.PREFILL else self.pair.to_decode
                wire.append(FromRouter(ROUTER, message))
                self.attempts[name] = message.fence.attempt
            elif isinstance(action, Deliver):
                assert action.tokens[0].offset == len(self.answers[name])
                self.answers[name] += [emitted.token for emitted in action.tokens]
            elif isinstance(action, Finish):
                self.ends[name] = action.reason
            elif isinstance(action, PlaceAgain):
                self._feed(name, self._placed)
            assert not isinstance(action, Fail), action


def _event(word: object) -> object:
    assert not isinstance(word, AttemptFailed), word
    if isinstance(word, AttemptStarted):
        return LegStarted(word.role)
    if isinstance(word, AttemptFinished):
        return LegFinished(word.role, word.reason, word.prefill, word.handoff, word.decode)
    return TokensArrived([word])


def teach_short_answers(requests: Requests) -> None:
    """Twenty answers that end with their second token, so that decode expects no more of others."""
    chance = random.Random(1)
    stop_at_once = Sampling(max_tokens=200, seed=0, temperature=2.0, stop_token_ids=list(range(64)))
    for number in range(60):
        requests.ask(f"short {number}", chance.choices(range(128), k=3), stop_at_once)
    requests.until_idle()


def ask_all(requests: Requests) -> dict[str, list[int]]:
    chance = random.Random(2)
    for number in range(8):
        sampling = Sampling(
            max_tokens=90, seed=number, temperature=number % 2, top_p=0.9, presence_penalty=0.3, logprobs=number % 3
        )
        prompt = chance.choices(range(128), k=chance.randint(1, 40))
        requests.ask(f"long {number}", prompt, sampling, priority=number % 3)
    answers = requests.until_idle()
    return {name: tokens for name, tokens in answers.items() if name.startswith("long")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Pages for all."""
    folder = tmp_path_factory.mktemp("m")
    requests = Requests(Pair(tiny_engine(folder), tiny_engine(folder, pool_pages=600)), unified=True)
    answers = ask_all(requests)
    assert set(requests.attempts.values()) == {1}
    assert all(len(answer) == 90 for answer in answers.values())
    return answers


@pytest.mark.parametrize(
    ("cache", "ahead"),
    [(True, Switch.NEVER), (False, Switch.NEVER), (True, Switch.ALWAYS)],
    ids=["prefix-cache", "no-cache", "ahead"],
)
@pytest.mark.parametrize("unified", [False, True], ids=["1p1d", "unified"])
@pytest.mark.parametrize("policy", [SchedulingPolicy.FIRST_COME, SchedulingPolicy.PRIORITY])
def test_requests_that_outgrow_the_pool_give_the_same_tokens(tmp_path, expected, policy, unified, cache, ahead):
    settings = {"prefix_cache": cache, "policy": policy}
    decode = tiny_engine(tmp_path / "m", pool_pages=70, commit_quantile=0.5, ahead=ahead, **settings)
    requests = Requests(Pair(tiny_engine(tmp_path / "m", pool_pages=200, **settings), decode), unified=unified)
    teach_short_answers(requests)
    assert ask_all(requests) == expected
    attempts = [requests.attempts[name] for name in expected]
    assert 1 < max(attempts) <= 4, "some were interrupted, none often"
    assert {requests.ends[name] for name in expected} == {FinishReason.LENGTH}


@pytest.mark.parametrize("ahead", [Switch.NEVER, Switch.ALWAYS])
@pytest.mark.parametrize("unified", [False, True], ids=["1p1d", "unified"])
def test_a_retraction_at_each_step_changes_nothing(tmp_path, expected, unified, ahead):
    decode = tiny_engine(tmp_path / "m", pool_pages=600, retract_every_steps=1, ahead=ahead)
    requests = Requests(Pair(tiny_engine(tmp_path / "m", pool_pages=200), decode), unified=unified)
    assert ask_all(requests) == expected
    assert max(requests.attempts.values()) > 30

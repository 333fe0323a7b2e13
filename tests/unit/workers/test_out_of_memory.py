"""A step that the device has no memory for costs the newest of its requests, and nobody else anything."""

from __future__ import annotations

import pytest
import torch

from cluster.config import SchedulingPolicy
from cluster.errors import OutOfMemory, from_info
from cluster.messages import AttemptFailed, AttemptFinished, FinishReason, Role
from tests.unit.workers.pair import GREEDY, Pair, prompt, tiny_engine


class Narrow:
    """A decoder whose device runs out of memory in the middle of steps of more than `rows` rows."""

    def __init__(self, inner, rows):
        self.inner = inner
        self.rows = rows
        self.failures = 0

    def forward(self, step, between_layers=lambda: None):
        if len(step.tokens) > self.rows:
            between_layers()
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.inner.forward(step, between_layers)


def narrow(engine, rows):
    engine._decoder = Narrow(engine._decoder, rows)
    return engine._decoder


@pytest.fixture
def pair(tmp_path):
    return Pair(tiny_engine(tmp_path / "m"), tiny_engine(tmp_path / "m"))


def undisturbed(tmp_path, *prompts):
    pair = Pair(tiny_engine(tmp_path / "m"), tiny_engine(tmp_path / "m"))
    fences = [pair.request(f"r{number}", tokens, GREEDY, legs="decode") for number, tokens in enumerate(prompts)]
    pair.settle()
    return [pair.tokens(fence) for fence in fences]


def assert_refused(pair, fence, role):
    """By the leg of this role, so that its router tries elsewhere."""
    end = pair.ends(fence)[role]
    assert isinstance(end, AttemptFailed)
    error = from_info(end.error)
    assert (type(error), end.blame, error.retryable) == (OutOfMemory, role, True)


def test_the_newest_in_a_decode_step_goes_and_the_others_notice_nothing(pair, tmp_path):
    prompts = [prompt(5, 1), prompt(6, 2), prompt(7, 3)]
    first, second = [pair.request(f"r{number}", prompts[number], GREEDY, legs="decode") for number in (0, 1)]
    pair.turn()
    decoder = narrow(pair.engines["decode"], 8)
    newest = pair.request("r2", prompts[2], GREEDY, legs="decode")
    pair.settle()
    assert decoder.failures == 1
    assert_refused(pair, newest, Role.DECODE)
    assert pair.tokens(newest) == []
    assert [pair.tokens(first), pair.tokens(second)] == undisturbed(tmp_path, *prompts[:2])
    pair.assert_nothing_left()


def test_the_newest_prompt_of_a_prefill_step_goes_and_its_decode_leg_ends_too(pair, tmp_path):
    prompts = [prompt(6, 1), prompt(7, 2)]
    narrow(pair.engines["prefill"], 10)
    older = pair.request("r0", prompts[0], GREEDY, received_at=1.0)
    newest = pair.request("r1", prompts[1], GREEDY, received_at=2.0)
    pair.settle()
    assert_refused(pair, newest, Role.PREFILL)
    assert Role.DECODE in pair.ends(newest)
    assert [pair.tokens(older)] == undisturbed(tmp_path, prompts[0])
    assert isinstance(pair.ends(older)[Role.PREFILL], AttemptFinished)
    pair.assert_nothing_left()


@pytest.mark.parametrize("legs", ["prefill", "decode", "prefill decode"])
def test_what_fits_no_step_by_itself_is_refused_and_the_worker_goes_on(pair, legs):
    worker = "decode" if legs == "decode" else "prefill"
    decoder = narrow(pair.engines[worker], 8)
    large = pair.request("large", prompt(12), GREEDY, legs=legs)
    pair.settle()
    assert_refused(pair, large, Role(worker))
    assert decoder.failures == 1
    small = pair.request("small", prompt(4, 1), GREEDY)
    pair.settle()
    assert pair.ends(small)[Role.DECODE].reason is FinishReason.LENGTH
    pair.assert_nothing_left()


def test_a_short_prompt_that_overtakes_is_refused_alone(tmp_path):
    """The step that it goes before is under way, with buffers of its own."""
    engines = [tiny_engine(tmp_path / "m", policy=SchedulingPolicy.SHORTEST_FIRST), tiny_engine(tmp_path / "m")]
    pair = Pair(*engines)
    decoder = narrow(pair.engines["prefill"], 0)
    large = pair.request("large", prompt(12, 1), GREEDY)

    def full_for_others(step, between_layers=lambda: None):
        if len(step.tokens) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decoder.inner.forward(step, between_layers)

    decoder.forward = full_for_others
    arrived = []

    def arrive():
        if not arrived:
            arrived.append(pair.request("short", prompt(3, 2), GREEDY))

    pair.between_layers = arrive
    pair.settle()
    assert_refused(pair, arrived[0], Role.PREFILL)
    assert pair.ends(large)[Role.DECODE].reason is FinishReason.LENGTH
    pair.assert_nothing_left()

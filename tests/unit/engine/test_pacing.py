"""How prompts share steps with decodes on a unified worker."""

from __future__ import annotations

import pytest

from cluster.messages import Sampling
from engine.pacing import LEAST_CHUNK, Pacing
from engine.sequence import Sequence


def waiting(tokens=10, arrived=0.0, attempt=1):
    return Sequence("w", [1] * tokens, [], Sampling(max_tokens=5, seed=0), arrived=arrived, attempt=attempt)


def decoding():
    return Sequence("d", [1] * 4, [1], Sampling(max_tokens=5, seed=0), 4)


@pytest.mark.parametrize(
    ("conservativeness", "beside"), [(0.0, 512), (0.25, 215), (0.5, 91), (0.75, 38), (1.0, LEAST_CHUNK)]
)
def test_prompts_give_way_to_decodes_as_far_as_was_asked(conservativeness, beside):
    pacing = Pacing(512, conservativeness)
    assert pacing.budget(decodes=1) == pacing.budget(decodes=30) == beside
    assert pacing.budget(decodes=0) == 512, "nobody is delayed"


def test_prompts_share_a_step_in_their_order():
    assert Pacing(96).share([64, 20, 500, 9], decodes=0) == [64, 20, 12]
    assert Pacing(96).share([500, 20], decodes=0) == [96]


def test_a_step_that_completes_a_prompt_need_not_be_filled_up():
    pacing = Pacing(96, fill=False)
    assert pacing.share([64, 20, 500, 9], decodes=0) == [64, 20], "no first token waits for a part of a prompt"
    assert pacing.share([500, 600], decodes=0) == [96], "a long prompt gets on"
    assert pacing.share([64, 32, 500], decodes=0) == [64, 32]


def test_a_small_chunk_stays_whole():
    assert Pacing(7, 1.0).budget(decodes=3) == 7


def test_new_prompts_wait_for_company_while_others_decode():
    pacing = Pacing(64, delay_seconds=1.0)
    assert pacing.holds_back([waiting(arrived=5.0)], [decoding()], 5.5)


@pytest.mark.parametrize(
    ("queue", "running"),
    [
        ([waiting(arrived=5.0)], []),
        ([waiting(arrived=5.0)], [decoding(), waiting()]),
        ([waiting(tokens=40, arrived=5.0), waiting(tokens=30, arrived=5.0)], [decoding()]),
        ([waiting(arrived=5.0), waiting(arrived=4.5)], [decoding()]),
        ([waiting(arrived=5.0, attempt=2)], [decoding()]),
    ],
    ids=[
        "nothing decodes",
        "a prompt is under way",
        "they fill a step",
        "one has waited enough",
        "one was interrupted",
    ],
)
def test_they_do_not_wait_when(queue, running):
    assert not Pacing(64, delay_seconds=1.0).holds_back(queue, running, 5.5)


def test_nobody_waits_without_a_delay():
    assert not Pacing(64).holds_back([waiting()], [decoding()], 0.0)

"""Prompts are the same for everybody who names the same seed, and help no cache."""

import pytest

from bench.workload import FIRST_PLAIN_TOKEN, WORKLOADS, Prompts


def test_a_prompt_depends_on_its_seed_and_number_only():
    in_order, alone = Prompts(7, 49152), Prompts(7, 49152)
    in_order.prompt("long", 0, 1500)
    assert in_order.prompt("long", 1, 1500) == alone.prompt("long", 1, 1500)
    assert alone.prompt("long", 1, 64) != Prompts(8, 49152).prompt("long", 1, 64)


def test_prompts_share_no_beginning_and_no_special_token():
    prompts = Prompts(0, 1000)
    made = [prompts.prompt(f"steady-{stream}", number, 64) for stream in range(8) for number in range(20)]
    assert len({tuple(prompt[:4]) for prompt in made}) == len(made)
    assert all(FIRST_PLAIN_TOKEN <= token < 1000 for prompt in made for token in prompt)


def test_a_vocabulary_without_plain_tokens_is_refused():
    with pytest.raises(ValueError, match="vocabulary"):
        Prompts(0, FIRST_PLAIN_TOKEN)


def test_each_workload_goes_by_its_own_name():
    assert all(workload.name == name for name, workload in WORKLOADS.items())

"""Choosing tokens: the right distribution, filters that mean what their users expect, rows on their own."""

from __future__ import annotations

import math

import pytest
import torch

from cluster.messages import Sampling
from engine.sampler import choose, nucleus_by_bisection, nucleus_by_sorting
from engine.sequence import Sequence


def row(temperature=1.0, seed=0, prompt=1, output=(), **settings):
    sampling = Sampling(max_tokens=10_000, seed=seed, temperature=temperature, **settings)
    return Sequence("key", [0] * prompt, list(output), sampling)


def tokens(logits, sequences):
    return [choice.token for choice in choose(logits.clone(), sequences)]


def drawn(logits, count=4000, **settings):
    """How often each token is drawn from one row of logits, at `count` positions."""
    found = tokens(logits.expand(count, -1), [row(prompt=position, **settings) for position in range(1, count + 1)])
    return torch.bincount(torch.tensor(found), minlength=logits.shape[-1])


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    return float(((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum())


LOGITS = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 1.5, -3.0, 0.2])


def test_tokens_come_as_often_as_the_model_says():
    # 7 degrees of freedom: 24.3 is exceeded once in 1,000 times; seeds are fixed.
    assert chi_square(drawn(LOGITS), LOGITS.softmax(-1)) < 24.3
    assert chi_square(drawn(LOGITS, temperature=0.5, seed=3), (LOGITS / 0.5).softmax(-1)) < 24.3


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 3}, [0, 2, 5]),
        ({"top_k": 1000}, list(range(8))),
        ({"top_p": 0.6}, [2, 5]),  # .39 + .24
        ({"min_p": 0.3}, [0, 2, 5]),
        ({"top_k": 4, "top_p": 0.8}, [0, 2, 5]),
        ({"top_p": 1e-9}, [2]),
    ],
)
def test_filters_keep_the_most_likely_and_their_proportions(settings, kept):
    probabilities = LOGITS.softmax(-1)
    allowed = torch.zeros(8)
    allowed[kept] = probabilities[kept]
    assert chi_square(drawn(LOGITS, **settings), allowed / allowed.sum()) < 24.3


def test_top_p_counts_the_mass_that_top_k_has_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two that top-k leaves, the first alone holds 4/7 of the mass.
    assert drawn(logits, top_k=2, top_p=0.55)[1] == 0
    assert drawn(logits, top_k=2, top_p=0.6)[1] > 0


def test_a_nucleus_wider_than_what_is_sorted_first_is_whole():
    logits = torch.zeros(1, 5000)
    logits[0, :100] = 0.5
    counts = drawn(logits[0], count=3000, top_p=0.99)
    assert counts[100:].sum() > 0
    flat = drawn(torch.cat((torch.full((600,), 5.0), torch.zeros(4400))), count=3000, top_p=0.9)
    assert (flat[:600] > 0).sum() > 400
    assert flat[600:].sum() == 0


def test_a_nucleus_is_the_same_sorted_and_bisected():
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(40, 3000, generator=generator) * torch.linspace(0.0, 6.0, 40)[:, None]
    tied = torch.randint(0, 4, (40, 3000), generator=generator).float()
    for logits in (wide, tied, wide[:, :50], torch.eye(40) * 1e4, wide[:, :1]):
        rows = logits.softmax(-1)
        for share in (0.0, 1e-9, 0.3, 0.9, 0.999):
            mass = share * rows.sum(-1, keepdim=True, dtype=torch.float64)
            assert torch.equal(nucleus_by_bisection(rows, mass), nucleus_by_sorting(rows, mass))


def test_ties_at_a_threshold_all_stay():
    logits = torch.tensor([0.0, 2.0, 2.0, 2.0, 1.0])
    assert (drawn(logits, top_k=2) > 0).tolist() == [False, True, True, True, False]


def test_greedy_takes_the_first_of_the_best():
    assert tokens(torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]]), [row(0), row(0)]) == [1, 0]


@pytest.mark.parametrize("temperature", [1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature):
    logits = torch.tensor([[100.0, 101.0, -1e30]])
    assert tokens(logits, [row(temperature)]) == [1]


def test_a_token_that_can_not_be_is_never_drawn():
    logits = torch.full((1, 50_000), -math.inf)
    logits[0, 31_337] = -2.0
    assert {tokens(logits, [row(seed=seed, top_p=0.9)])[0] for seed in range(50)} == {31_337}


def test_the_same_seed_and_position_draw_the_same_and_others_differ():
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    same = {tokens(logits, [row(seed=5, prompt=9)])[0] for _ in range(3)}
    split = {tokens(logits, [row(seed=5, prompt=9 - earlier, output=[0] * earlier)])[0] for earlier in range(4)}
    assert same == split
    assert len(same) == 1
    assert len({tokens(logits, [row(seed=seed, prompt=9)])[0] for seed in range(50)}) > 30
    assert len({tokens(logits, [row(seed=5, prompt=prompt)])[0] for prompt in range(1, 50)}) > 30


def mixed_rows():
    return [
        row(0.0),
        row(1.0, seed=1),
        row(0.7, seed=2, top_k=20),
        row(1.3, seed=3, top_p=0.8),
        row(1.0, seed=4, min_p=0.05, presence_penalty=1.5, output=[3, 3, 8]),
        row(0.0, frequency_penalty=2.0, output=[5, 5, 5]),
        row(0.9, seed=6, top_k=5, top_p=0.9, logprobs=3),
        row(1.0, seed=7, top_p=0.999, prompt=77),
        row(0.5, seed=8, logprobs=0),
        row(2.0, seed=9, top_k=1),
    ]


def test_a_row_does_not_depend_on_its_neighbours():
    logits = torch.randn(10, 3000, generator=torch.Generator().manual_seed(1)) * 3
    together = choose(logits.clone(), mixed_rows())
    alone = [choose(logits[[index]].clone(), [sequence])[0] for index, sequence in enumerate(mixed_rows())]
    backwards = choose(logits.flip(0), mixed_rows()[::-1])[::-1]
    assert [choice.token for choice in together] == [choice.token for choice in alone]
    assert [choice.token for choice in together] == [choice.token for choice in backwards]
    assert together[6].logprobs.top == alone[6].logprobs.top


def test_penalties_lower_tokens_of_the_output_and_not_of_the_prompt():
    logits = torch.tensor([[2.0, 1.9, 1.5, 0.0]])

    def penalized(**settings):
        sequence = Sequence("key", [0, 0, 0], [0, 1, 1], Sampling(max_tokens=9, seed=0, temperature=0.0, **settings))
        return tokens(logits, [sequence])[0]

    assert penalized() == 0
    assert penalized(frequency_penalty=0.05) == 0  # 1.95 against 1.8
    assert penalized(presence_penalty=0.6) == 2  # 1.4 and 1.3 against 1.5
    assert penalized(frequency_penalty=0.6) == 2
    assert penalized(frequency_penalty=-1.0) == 1  # a negative one rewards
    assert tokens(logits, [row(0.0, presence_penalty=2.0)]) == [0]


def test_logprobs_are_the_models_own_before_temperature_penalties_and_filters():
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
    sequence = row(0.0, logprobs=2, presence_penalty=9.0, output=[2])
    (choice,) = choose(logits.clone(), [sequence])
    expected = logits.log_softmax(-1)[0]
    assert choice.token == 1
    assert choice.logprobs.chosen == pytest.approx(expected[1].item())
    assert [token for token, _ in choice.logprobs.top] == [2, 1]
    assert choice.logprobs.top[0][1] == pytest.approx(expected[2].item())


def test_each_row_gets_the_logprobs_that_it_asked_for():
    logits = torch.randn(4, 10)
    found = choose(logits, [row(logprobs=count) for count in (None, 0, 3, 20)])
    assert found[0].logprobs is None
    assert [len(choice.logprobs.top) for choice in found[1:]] == [0, 3, 10]


def test_a_step_that_samples_nothing_is_fine():
    assert choose(torch.empty(0, 10), []) == []

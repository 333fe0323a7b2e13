"""How many tokens of output a sequence gets pages for: what answers of late tell, and what a cut-off one tells."""

from __future__ import annotations

import random

import pytest

from cluster.messages import Sampling
from engine.commitment import ENOUGH, LEAST, MARGIN, REMEMBERED, UNKNOWN, Commitments
from engine.sequence import Sequence


def tokens_for(commitments: Commitments, max_tokens: int = 8000, *, output: int = 0, attempt: int = 1) -> int:
    """Output tokens that a sequence with a prompt of 10 gets pages for, `output` and the last one included."""
    sampling = Sampling(max_tokens=max_tokens, seed=0)
    return commitments.capacity(Sequence("a", [1] * 10, [1] * output, sampling, attempt=attempt)) - 10


def taught(quantile: float, *answers: tuple[int, int, bool]) -> Commitments:
    """By (how many, tokens, cut off)."""
    commitments = Commitments(quantile)
    for count, tokens, cut_off in answers:
        for _ in range(count):
            commitments.ended(tokens, cut_off=cut_off)
    return commitments


def test_what_answers_take_counts_and_not_what_they_may():
    assert tokens_for(taught(0.9, (100, 200, False))) == 200 * MARGIN
    assert tokens_for(taught(0.9, (100, 200, False)), max_tokens=150) == 149, "never more than it can need"


def test_the_quantile_says_how_bold():
    commitments = taught(0.9, (50, 100, False), (40, 200, False), (10, 4000, False))
    assert tokens_for(commitments) == 200 * MARGIN
    bolder = taught(0.5, (50, 100, False), (40, 200, False), (10, 4000, False))
    assert tokens_for(bolder) == 100 * MARGIN


def test_at_one_all_that_may_be_is_kept():
    assert tokens_for(taught(1.0, (100, 5, False))) == 7999


def test_without_answers_a_guess_stands():
    assert tokens_for(taught(0.9, (ENOUGH - 1, 5, False))) == UNKNOWN * MARGIN


def test_answers_that_are_all_cut_off_tell_no_end():
    assert tokens_for(taught(0.9, (100, 64, True)), max_tokens=64) == 63
    assert tokens_for(taught(0.9, (100, 64, True))) == 7999


def test_a_cut_off_answer_tells_only_that_it_was_longer():
    """60 of 100 were cut at 50; of those that were not, half ended at 100 and half at 300."""
    commitments = taught(0.6, (60, 50, True), (20, 100, False), (20, 300, False))
    assert tokens_for(commitments) == 300 * MARGIN, "as if the 60 had gone on like the other 40"


def test_who_has_outgrown_most_answers_is_judged_by_the_others():
    commitments = taught(0.9, (200, 50, False), (40, 1000, False))
    assert tokens_for(commitments) == 1000 * MARGIN
    assert tokens_for(commitments, output=600) == 600 + 400 * MARGIN
    assert tokens_for(commitments, output=2000) == 2000 + UNKNOWN * MARGIN


def test_an_entry_is_always_worth_some_steps():
    assert tokens_for(taught(0.9, (100, 1, False))) == LEAST


def test_only_recent_answers_count():
    assert tokens_for(taught(0.9, (REMEMBERED, 3000, False), (REMEMBERED, 100, False))) == 100 * MARGIN


def test_interruptions_are_few_because_each_doubles():
    commitments = taught(0.9, (100, 10, False))
    given = [tokens_for(commitments, attempt=attempt) for attempt in range(1, 12)]
    assert given[:4] == [LEAST, 2 * LEAST, 4 * LEAST, 8 * LEAST]
    assert given[8:] == [7999] * 3, "after log2(8000 / 32) interruptions it has all, and is not interrupted any more"


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95])
def test_the_promised_share_of_answers_stays_within(quantile):
    """Lengths of which a third is cut off by a small limit: the estimate for an unlimited one still holds."""
    chance = random.Random(4)
    lengths = [int(chance.lognormvariate(5, 0.7)) + 1 for _ in range(4000)]
    commitments = Commitments(quantile)
    within = []
    for number, length in enumerate(lengths):
        if number > REMEMBERED:
            within.append(length <= tokens_for(commitments) + 1)
        limit = 100 if number % 3 == 0 else 8000
        commitments.ended(min(length, limit), cut_off=length > limit)
    assert sum(within) / len(within) >= quantile

"""The sampler's noise: fixed for good, uniform, and unrelated between neighbours."""

from __future__ import annotations

import numpy as np

from engine.noise import uniform


def test_it_never_changes():
    """A request that resumes on a worker of another version must draw the same."""
    found = uniform([0, 0, 1, 2**64 - 1, -1, 2**64], [0, 1, 0, 5, 5, 0])
    assert found[3] == found[4]
    assert found[0] == found[5]
    assert [round(number, 12) for number in found[:4].tolist()] == [
        0.652448486374,
        0.701212109522,
        0.368189515652,
        0.154033425805,
    ]


def test_a_number_does_not_depend_on_its_neighbours():
    together = uniform(range(50), range(50, 100))
    alone = [uniform([seed], [seed + 50])[0] for seed in range(50)]
    assert together.tolist() == alone


def test_it_is_uniform_over_positions_and_over_seeds():
    for numbers in (uniform([7] * 20000, range(20000)), uniform(range(20000), [7] * 20000)):
        assert 0 <= numbers.min() <= numbers.max() < 1
        counts = np.histogram(numbers, 100, (0, 1))[0]
        # 99 degrees of freedom: a fair generator exceeds 160 once in 10,000 times, and this one is fixed.
        assert ((counts - 200) ** 2 / 200).sum() < 160
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03

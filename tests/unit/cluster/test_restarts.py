"""How soon a process that died comes back, and when it does not."""

from cluster.config import Restarts
from cluster.restarts import RestartBudget


def test_the_first_death_is_answered_at_once_and_the_pauses_double_up_to_a_bound():
    budget = RestartBudget(Restarts(most=6, longest_pause_seconds=3.0))
    assert [budget.died(float(now)) for now in range(6)] == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0]
    assert budget.restarts == 6


def test_one_death_more_than_the_budget_is_given_up_and_says_why():
    budget = RestartBudget(Restarts(most=2, window_seconds=60.0))
    assert [budget.died(now) for now in (0.0, 10.0, 20.0)] == [0.0, 0.5, None]
    assert budget.verdict() == "it has died 3 times within 60 s"


def test_old_deaths_are_forgotten():
    budget = RestartBudget(Restarts(most=2, window_seconds=60.0))
    assert [budget.died(float(now)) for now in range(0, 610, 61)] == [0.0] * 10

"""What to do about the end of a process that nobody of us stopped. Pure: an end and a time in, a decision out."""

from __future__ import annotations

from typing import NamedTuple, Union

from cluster.config import Restarts
from cluster.process import EXIT_DONE, EXIT_RESTART
from cluster.restarts import RestartBudget
from deploy.launchers.processes import ProcessExit


class LeaveEnded(NamedTuple):
    """Somebody asked it to end, and it did so in order."""


class StartAgain(NamedTuple):
    after_seconds: float


class GiveUp(NamedTuple):
    verdict: str
    """Why, for people."""


Decision = Union[LeaveEnded, StartAgain, GiveUp]


class Supervisor:
    """Judges the ends of a cluster's processes; each has a budget of its own."""

    def __init__(self, config: Restarts) -> None:
        self._config = config
        self._budgets: dict[str, RestartBudget] = {}

    def judge(self, end: ProcessExit, now: float) -> Decision:
        if end.code == EXIT_DONE:
            return LeaveEnded()
        if end.code == EXIT_RESTART:
            return StartAgain(0.0)
        budget = self._budgets.setdefault(end.name, RestartBudget(self._config))
        pause = budget.died(now)
        return GiveUp(budget.verdict()) if pause is None else StartAgain(pause)

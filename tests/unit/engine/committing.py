"""Steps of a scheduler whose tokens come at once."""

from __future__ import annotations

from cluster.messages import FinishReason
from engine.scheduler import Scheduler, StepPlan


def commit(scheduler: Scheduler, plan: StepPlan, tokens: list[int]) -> list[FinishReason | None]:
    """Launches the step, and gives its tokens to those that sample: who has finished, and why."""
    sampling = plan.sampling
    scheduler.launched(plan)
    taken = scheduler.commit(sampling, tokens)
    assert None not in taken
    return [token.finished for token in taken if token is not None]

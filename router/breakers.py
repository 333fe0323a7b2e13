"""The breakers of all workers and legs that something is held against; a worker without one is well. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.config import Recovery
from cluster.messages import Role
from router.breaker_state import Action, BreakerMachine, BreakerState, Event, LegBlamed

Leg = tuple[str, Role]
"""A worker's name, and which leg it runs."""


class Breakers:
    """By worker and leg; kept from the first failure until nothing is held against it any more."""

    def __init__(self, limits: Recovery) -> None:
        self._limits = limits
        self._machines: dict[Leg, BreakerMachine] = {}

    def handle(self, leg: Leg, event: Event, now: float) -> Iterable[Action]:
        machine = self._machines.get(leg)
        if machine is None:
            if not isinstance(event, LegBlamed):
                return ()
            machine = self._machines[leg] = BreakerMachine(f"{leg[0]} ({leg[1].value})", self._limits)
        actions = machine.handle(event, now)
        if machine.healthy:
            del self._machines[leg]
        return actions

    def shut(self, now: float) -> frozenset[Leg]:
        """Those that placement should avoid."""
        return frozenset(leg for leg, machine in self._machines.items() if machine.shut(now))

    def state(self, leg: Leg) -> BreakerState:
        machine = self._machines.get(leg)
        state = machine.state if machine else BreakerState.CLOSED
        assert isinstance(state, BreakerState)
        return state

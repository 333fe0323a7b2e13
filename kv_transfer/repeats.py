"""How long to wait for an answer, and when to say something again that may have been lost. Pure."""

from __future__ import annotations

from cluster.config import Router

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 10.0
LIFETIME_SECONDS = Router().request_timeout_seconds
"""Of a handoff, where nobody says otherwise. What usually ends one is its router, when the request's time is over."""


class Repeats:
    """A word that is repeated until it is answered: after `FIRST_SECONDS`, then after twice as long each time, up to
    `LONGEST_SECONDS`. Connections keep their order and lose nothing while they last, so it is for what a process on the
    way has dropped, and doesn't have to be quick."""

    def __init__(self) -> None:
        self.due: float | None = None
        """When to say it again; None while no answer is awaited."""
        self._pause = FIRST_SECONDS

    def start(self, now: float) -> None:
        """It is said now, for the first time or because the connection is new."""
        self._pause = FIRST_SECONDS
        self.due = now + self._pause

    def again(self, now: float) -> None:
        """It is repeated now."""
        self._pause = min(2 * self._pause, LONGEST_SECONDS)
        self.due = now + self._pause

    def stop(self) -> None:
        self.due = None

    def is_due(self, now: float) -> bool:
        return self.due is not None and now >= self.due

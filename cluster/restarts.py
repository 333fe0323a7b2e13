"""When a process that died is started anew, and when it is given up. Pure: time is an argument."""

from __future__ import annotations

from collections import deque

from cluster.config import Restarts

FIRST_PAUSE_SECONDS = 0.5


class RestartBudget:
    """The deaths of one process. One death is bad luck, and answered at once; more of them look like a cause that is
    still there, so that each waits twice as long as the one before, until there have been too many."""

    def __init__(self, config: Restarts) -> None:
        self._config = config
        self._deaths: deque[float] = deque()
        self.restarts = 0
        """Restarts granted so far."""

    def died(self, now: float) -> float | None:
        """Notes a death. Returns the seconds to wait before the next start, or None: give up."""
        while self._deaths and now - self._deaths[0] > self._config.window_seconds:
            self._deaths.popleft()
        self._deaths.append(now)
        if len(self._deaths) > self._config.most:
            return None
        self.restarts += 1
        if len(self._deaths) == 1:
            return 0.0
        pause: float = FIRST_PAUSE_SECONDS * 2.0 ** (len(self._deaths) - 2)
        return min(pause, self._config.longest_pause_seconds)

    def verdict(self) -> str:
        """Why it was given up, for people."""
        return f"it has died {len(self._deaths)} times within {self._config.window_seconds:g} s"

"""One cluster from its first process to its last: starts it, waits until it can serve, notices a death, stops it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from cluster.clock import Clock
from cluster.errors import LaunchError
from cluster.messages import MemberStatus
from deploy.display import Display
from deploy.launchers.base import Launcher, ProcessExit, ProcessSpec
from deploy.log_lines import last_error, last_event, readable
from deploy.plan import stop_order
from deploy.startup import Observation, Startup

Probe = Callable[[], Awaitable[tuple[Sequence[MemberStatus] | None, bool]]]
"""Looks at the cluster from outside: the roster (None: bootstrap does not answer), and the router's health."""

GRACE_SECONDS = 10.0
"""For each group of processes between SIGTERM and SIGKILL; a worker gives its engine process half of that."""

_PROBE_INTERVAL = 0.2
_EVENT_LINES = 20
_LAST_WORDS = 15


class Session:
    """Owns the processes of `specs` between `start` and `stop`, which the caller calls in any case."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        launcher: Launcher,
        probe: Probe,
        display: Display,
        clock: Clock,
    ) -> None:
        self._specs = specs
        self._launcher = launcher
        self._probe = probe
        self._display = display
        self._clock = clock

    async def start(self, timeout_seconds: float) -> None:
        """Starts all processes and returns once every worker takes work and the router is healthy.

        Raises `LaunchError` if one can't be started or dies, or if they are not ready in time.
        """
        startup = Startup(self._specs, self._clock.now())
        for spec in self._specs:
            await self._launcher.start(spec)
        deadline = self._clock.now() + timeout_seconds
        dying = asyncio.create_task(self.watch())
        try:
            while True:
                startup.observe(await self._observe(), self._clock.now())
                self._display.show(startup.progress)
                if startup.ready:
                    return
                if self._clock.now() > deadline:
                    raise LaunchError(self._too_slow(startup, timeout_seconds))
                done, _ = await asyncio.wait({dying}, timeout=_PROBE_INTERVAL)
                for death in done:
                    death.result()
        finally:
            dying.cancel()
            self._display.close()

    async def watch(self) -> None:
        """Waits for the death of a process, and raises it as a `LaunchError` with the process's last words."""
        raise LaunchError(self._obituary(await self._launcher.next_exit()))

    async def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Stops everything, in order. When it returns, nothing of the cluster is left."""
        for names in stop_order(self._specs):
            await self._launcher.stop(names, grace_seconds)

    async def _observe(self) -> Observation:
        roster, healthy = await self._probe()
        events = {spec.name: last_event(self._launcher.log_tail(spec.name, _EVENT_LINES)) for spec in self._specs}
        return Observation(roster, healthy, events)

    def _obituary(self, end: ProcessExit) -> str:
        lines = self._launcher.log_tail(end.name, _LAST_WORDS)
        reason = last_error(lines)
        headline = f"{end}: {reason}" if reason else str(end)
        if not lines:
            return f"{headline}; it wrote no log"
        quoted = "\n".join(f"  {line}" for entry in lines for line in readable(entry).splitlines())
        return f"{headline}\nthe end of its log:\n{quoted}"

    def _too_slow(self, startup: Startup, seconds: float) -> str:
        logs = {status.name: status.log for status in self._launcher.status()}
        waiting = "\n".join(f"  {name}, see {logs[name]}" for name in startup.waiting_for())
        return f"not ready after {seconds:g} s:\n{waiting}"

"""One cluster from its first process to its last: starts it, waits until it can serve, replaces what dies, stops it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from cluster.clock import Clock
from cluster.errors import LaunchError
from cluster.messages import MemberStatus
from cluster.process import EXIT_RESTART
from cluster.tasks import cancel
from deploy.display import Display
from deploy.launchers.processes import ProcessExit, ProcessRunner, ProcessSpec
from deploy.log_lines import last_error, last_event, readable
from deploy.plan import stop_order
from deploy.startup import Observation, Startup
from deploy.supervision import GiveUp, LeaveEnded, Supervisor

Probe = Callable[[], Awaitable[tuple[Sequence[MemberStatus] | None, bool]]]
"""Looks at the cluster from outside: the roster (None: bootstrap does not answer), and the router's health."""

GRACE_SECONDS = 10.0
"""For each group of processes between SIGTERM and SIGKILL, beside the time that it may take to drain; a worker gives
its engine process half of that."""

_PROBE_INTERVAL = 0.2
_EVENT_LINES = 20
_LAST_WORDS = 15


class Session:
    """Owns the processes of `specs` between `start` and `stop`, which the caller calls in any case."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        launcher: ProcessRunner,
        probe: Probe,
        display: Display,
        clock: Clock,
        supervisor: Supervisor,
    ) -> None:
        self._specs = specs
        self._launcher = launcher
        self._probe = probe
        self._display = display
        self._clock = clock
        self._supervisor = supervisor
        self._ended: set[str] = set()
        """Names of processes that were asked to end, and did."""

    async def start(self, timeout_seconds: float) -> None:
        """Starts all processes and returns once every worker takes work and the router is healthy.

        Raises `LaunchError` if one can't be started or dies, or if they are not ready in time.
        """
        startup = Startup(self._specs, self._clock.now())
        for spec in self._specs:
            await self._launcher.start(spec)
        deadline = self._clock.now() + timeout_seconds
        dying = asyncio.create_task(self._first_death())
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
        """Starts anew what dies. Returns when every process has ended because somebody asked it to.

        Raises `LaunchError`, with its last words, for a process that has died too often.
        """
        ends = asyncio.ensure_future(self._launcher.next_exit())
        restarts: set[asyncio.Future[Any]] = set()
        try:
            while len(self._ended) < len(self._specs):
                await asyncio.wait({ends, *restarts}, return_when=asyncio.FIRST_COMPLETED)
                for restart in [restart for restart in restarts if restart.done()]:
                    restarts.remove(restart)
                    restart.result()
                if ends.done():
                    pause = self._judge(ends.result())
                    if pause is not None:
                        restarts.add(asyncio.ensure_future(self._start_again(ends.result().name, pause)))
                    ends = asyncio.ensure_future(self._launcher.next_exit())
        finally:
            await cancel(ends, *restarts)

    def _judge(self, end: ProcessExit) -> float | None:
        """How long to wait before its next start; None: there is none."""
        decision = self._supervisor.judge(end, self._clock.now())
        if isinstance(decision, GiveUp):
            raise LaunchError(f"{end.name}: {decision.verdict}; the last time:\n{self._obituary(end)}")
        if isinstance(decision, LeaveEnded):
            self._ended.add(end.name)
            self._display.tell(f"{end.name} ended as it was asked to")
            return None
        if end.code == EXIT_RESTART:
            self._display.tell(f"{end.name} starts anew as it was asked to")
        else:
            when = f"in {decision.after_seconds:g} s" if decision.after_seconds else "now"
            self._display.tell(f"{self._headline(end)}; starting it anew {when}")
        return decision.after_seconds

    async def _start_again(self, name: str, pause: float) -> None:
        await asyncio.sleep(pause)
        (spec,) = [spec for spec in self._specs if spec.name == name]
        await self._launcher.start(spec)

    async def _first_death(self) -> None:
        """Before the cluster is ready none is replaced: what can't start is wrong in itself."""
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
        headline = self._headline(end)
        if not lines:
            return f"{headline}; it wrote no log"
        quoted = "\n".join(f"  {line}" for entry in lines for line in readable(entry).splitlines())
        return f"{headline}\nthe end of its log:\n{quoted}"

    def _headline(self, end: ProcessExit) -> str:
        if end.code < 0:  # it had no time for words: what its log has last is of something else
            return str(end)
        reason = last_error(self._launcher.log_tail(end.name, _LAST_WORDS))
        return f"{end}: {reason}" if reason else str(end)

    def _too_slow(self, startup: Startup, seconds: float) -> str:
        logs = {status.name: status.log for status in self._launcher.status()}
        waiting = "\n".join(f"  {name}, see {logs[name]}" for name in startup.waiting_for())
        return f"not ready after {seconds:g} s:\n{waiting}"

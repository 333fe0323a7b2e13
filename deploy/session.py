"""One cluster from its first process to its last: starts it, waits until it can serve, replaces what dies, stops it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence, Set
from typing import Any

from cluster.clock import Clock
from cluster.errors import LaunchError
from cluster.messages import MemberStatus
from cluster.process import EXIT_RESTART
from cluster.tasks import cancel
from deploy.display import Display
from deploy.launchers.processes import ProcessExit, ProcessRunner, ProcessSpec, ProcessStatus
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
    """Owns the processes of `specs`, and those that come later, between `start` and `stop`, which the caller calls in
    any case."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        runner: ProcessRunner,
        probe: Probe,
        display: Display,
        clock: Clock,
        supervisor: Supervisor,
    ) -> None:
        self._specs = {spec.name: spec for spec in specs}
        """What should run, oldest first."""
        self._runner = runner
        self._probe = probe
        self._display = display
        self._clock = clock
        self._supervisor = supervisor
        self.changing = asyncio.Lock()
        """Held by whoever changes what should run: two that don't know of each other would count alike."""
        self._leaving: set[str] = set()
        """Of `_specs`: those that are being stopped."""
        self._newcomers: dict[str, asyncio.Future[None]] = {}
        """Those that have not yet shown that they can work, and who waits for that."""

    async def start(self, timeout_seconds: float) -> None:
        """Starts all processes and returns once every worker takes work and the router is healthy.

        Raises `LaunchError` if one can't be started or dies, or if they are not ready in time.
        """
        specs = list(self._specs.values())
        startup = Startup(specs, self._clock.now())
        for spec in specs:
            await self._runner.start(spec)
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
        ends = asyncio.ensure_future(self._runner.next_exit())
        restarts: set[asyncio.Future[Any]] = set()
        try:
            while self._specs:
                await asyncio.wait({ends, *restarts}, return_when=asyncio.FIRST_COMPLETED)
                for restart in [restart for restart in restarts if restart.done()]:
                    restarts.remove(restart)
                    restart.result()
                if ends.done():
                    pause = self._judge(ends.result())
                    if pause is not None:
                        restarts.add(asyncio.ensure_future(self._start_again(ends.result().name, pause)))
                    ends = asyncio.ensure_future(self._runner.next_exit())
        finally:
            await cancel(ends, *restarts)

    def _judge(self, end: ProcessExit) -> float | None:
        """How long to wait before its next start; None: there is none."""
        if end.name not in self._specs or end.name in self._leaving:
            return None
        if end.name in self._newcomers:
            self._forget(end.name, LaunchError(self._obituary(end)))
            return None
        decision = self._supervisor.judge(end, self._clock.now())
        if isinstance(decision, GiveUp):
            raise LaunchError(f"{end.name}: {decision.verdict}; the last time:\n{self._obituary(end)}")
        if isinstance(decision, LeaveEnded):
            del self._specs[end.name]
            self._display.tell(f"{end.name} ended as it was asked to")
            return None
        if end.code == EXIT_RESTART:
            self._display.tell(f"{end.name} starts anew as it was asked to")
        else:
            when = f"in {decision.after_seconds:g} s" if decision.after_seconds else "now"
            self._display.tell(f"{self._headline(end)}; starting it anew {when}")
        return decision.after_seconds

    def _forget(self, newcomer: str, reason: LaunchError) -> None:
        del self._specs[newcomer]
        failure = self._newcomers.pop(newcomer)
        if not failure.done():
            failure.set_exception(reason)

    async def _start_again(self, name: str, pause: float) -> None:
        await asyncio.sleep(pause)
        spec, process = self._specs.get(name), self.processes().get(name)
        # Meanwhile it may have been retired, or started anew by request.
        if spec is not None and name not in self._leaving and (process is None or not process.running):
            await self._runner.start(spec)

    async def _first_death(self) -> None:
        """Before the cluster is ready none is replaced: what can't start is wrong in itself."""
        raise LaunchError(self._obituary(await self._runner.next_exit()))

    # --- while it runs -----------------------------------------------------------------------------------------------

    @property
    def specs(self) -> list[ProcessSpec]:
        """What should run and what has not ended yet, oldest first."""
        return list(self._specs.values())

    @property
    def leaving(self) -> Set[str]:
        """The names of those that are being stopped."""
        return self._leaving

    def processes(self) -> dict[str, ProcessStatus]:
        """What became of `specs`, by name."""
        return {status.name: status for status in self._runner.status() if status.name in self._specs}

    async def grow(self, specs: Sequence[ProcessSpec]) -> asyncio.Future[None]:
        """Starts processes beside the others. What can't start is wrong in itself: one that dies before it is called
        settled is not replaced, and the future raises a `LaunchError` with the last words of the first."""
        failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for spec in specs:
            self._specs[spec.name] = spec
            self._newcomers[spec.name] = failure
        for spec in specs:
            try:
                await self._runner.start(spec)
            except LaunchError as error:  # noqa: PERF203 - each may fail by itself
                self._forget(spec.name, error)
        return failure

    def settled(self, name: str) -> bool:
        """It can work: from now on it is replaced when it dies. Returns whether it was a newcomer."""
        return self._newcomers.pop(name, None) is not None

    async def retire(self, names: Sequence[str], grace_seconds: float) -> None:
        """Ends processes in order, together, and for good. Returns when they are gone."""
        names = [name for name in names if name in self._specs]
        self._leaving.update(names)
        await self._runner.stop(names, grace_seconds)
        # Not in a `finally`: what runs on when this is cancelled must be found by `stop`.
        self._leaving.difference_update(names)
        for name in names:
            del self._specs[name]
            self._newcomers.pop(name, None)

    async def start_anew(self, name: str, grace_seconds: float) -> None:
        """Ends a process in order and starts it once more. Raises `LaunchError` if it can't be started."""
        self._leaving.add(name)
        await self._runner.stop([name], grace_seconds)
        self._leaving.discard(name)
        await self._runner.start(self._specs[name])

    async def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Stops everything, in order. When it returns, nothing of the cluster is left."""
        for names in stop_order(self._specs.values()):
            self._leaving.update(names)
            await self._runner.stop(names, grace_seconds)
        self._specs.clear()

    async def _observe(self) -> Observation:
        roster, healthy = await self._probe()
        events = {name: last_event(self._runner.log_tail(name, _EVENT_LINES)) for name in self._specs}
        return Observation(roster, healthy, events)

    def _obituary(self, end: ProcessExit) -> str:
        lines = self._runner.log_tail(end.name, _LAST_WORDS)
        headline = self._headline(end)
        if not lines:
            return f"{headline}; it wrote no log"
        quoted = "\n".join(f"  {line}" for entry in lines for line in readable(entry).splitlines())
        return f"{headline}\nthe end of its log:\n{quoted}"

    def _headline(self, end: ProcessExit) -> str:
        if end.code < 0:  # it had no time for words: what its log has last is of something else
            return str(end)
        reason = last_error(self._runner.log_tail(end.name, _LAST_WORDS))
        return f"{end}: {reason}" if reason else str(end)

    def _too_slow(self, startup: Startup, seconds: float) -> str:
        statuses = {status.name: status for status in self._runner.status()}
        waiting = "\n".join(f"  {name}, {_whereabouts(statuses[name])}" for name in startup.waiting_for())
        return f"not ready after {seconds:g} s:\n{waiting}"


def _whereabouts(status: ProcessStatus) -> str:
    return f"which waits for {status.waiting_for}" if status.waiting_for else f"see {status.log}"

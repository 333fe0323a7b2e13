"""Simulated time: one event loop for all processes of a simulated cluster, which runs in no time and always alike.

`SimLoop` is an asyncio event loop as far as the real control plane needs one, and a clock for everything else. What
happens next is decided by a heap of (time, order of arrival) alone, so a seed gives the same history on every machine.

A `Strand` is one thread of a simulated process. What a strand schedules belongs to it: once the strand is dead it never
runs, and while the strand is held (stopped by SIGSTOP, or in the middle of a step) it waits. A step takes time by
running the rest of the world meanwhile (`SimLoop.spend`), so whatever can happen during a real step happens here, too.
"""

from __future__ import annotations

import asyncio
import contextvars
from asyncio import events
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.sim.cluster import SimCluster


class Killed(BaseException):
    """The process died in the middle of this call: nobody catches it but whoever runs that process."""


class Violation(AssertionError):
    """An invariant does not hold."""


class Strand:
    """One thread. `name` is for the story, `host` is where it runs in the network."""

    def __init__(self, name: str, host: str = "") -> None:
        self.name = name
        self.host = host
        self.asked_to_end: asyncio.Event
        """SIGTERM, for a control process."""
        self.alive = True
        self.holds = 0
        """How many reasons there are that it does not run now."""
        self.waiting: list[Timer] = []
        """What is due and waits for the strand to run again."""


class Timer:
    """A callback that is due at a time; a handle in asyncio's sense."""

    __slots__ = ("args", "callback", "cancelled_", "context", "strand", "when_")

    def __init__(
        self,
        when: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        strand: Strand | None,
        context: contextvars.Context | None,
    ) -> None:
        self.when_ = when
        self.callback = callback
        self.args = args
        self.strand = strand
        self.context = context
        self.cancelled_ = False

    def cancel(self) -> None:
        self.cancelled_ = True

    def cancelled(self) -> bool:
        return self.cancelled_

    def when(self) -> float:
        return self.when_


class SimLoop(asyncio.AbstractEventLoop):
    """See the module's docstring. `now` makes it a `cluster.clock.Clock`."""

    def __init__(self) -> None:
        self.strand: Strand | None = None
        """Who runs; None: the world itself."""
        self.cluster: SimCluster
        """What runs on it."""
        self.events = 0
        self._now = 1000.0
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    # --- time --------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._now

    time = now

    def run(self, until: float, stop: Callable[[], bool] | None = None) -> None:
        """Lets everything happen that is due by then, or until `stop` says so after an event."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            when, _, timer = heappop(heap)
            strand = timer.strand
            if timer.cancelled_ or (strand is not None and not strand.alive):
                continue
            if strand is not None and strand.holds:
                strand.waiting.append(timer)
                continue
            if when > self._now:
                self._now = when
            self._fire(timer)
            if stop is not None and stop():
                return
        self._now = max(self._now, until)

    def _fire(self, timer: Timer) -> None:
        before, self.strand = self.strand, timer.strand
        self.events += 1
        try:
            if timer.context is None:
                timer.callback(*timer.args)
            else:
                timer.context.run(timer.callback, *timer.args)
        finally:
            self.strand = before

    # --- strands -----------------------------------------------------------------------------------------------------

    @contextmanager
    def running(self, strand: Strand | None) -> Iterator[None]:
        """What is scheduled inside belongs to `strand`."""
        before, self.strand = self.strand, strand
        try:
            yield
        finally:
            self.strand = before

    def spend(self, strand: Strand, seconds: float, done: Callable[[], bool] = lambda: False) -> None:
        """`strand` computes, or waits until it is `done`, for so long; the others go on. Raises `Killed` if it dies
        of it."""
        until = self._now + seconds
        strand.holds += 1
        with self.running(None):
            self.run(until, lambda: not strand.alive or done())
            while strand.alive and strand.holds > 1:  # stopped in the middle: whoever stopped it lets it go on
                self.run(self._heap[0][0], lambda: not strand.alive)
        if not strand.alive:
            raise Killed(strand.name)
        self.release(strand)

    def hold(self, strand: Strand) -> None:
        strand.holds += 1

    def release(self, strand: Strand) -> None:
        strand.holds -= 1
        if not strand.holds:
            due, strand.waiting = strand.waiting, []
            for timer in due:
                self._push(self._now, timer)

    def at(self, delay: float, strand: Strand | None, callback: Callable[..., object], *args: Any) -> Timer:
        """Calls back after `delay` seconds, on `strand`."""
        timer = Timer(self._now + delay, callback, args, strand, None)
        if not self._closing:
            self._push(timer.when_, timer)
        return timer

    def _push(self, when: float, timer: Timer) -> None:
        self._order += 1
        heappush(self._heap, (when, self._order, timer))

    # --- what asyncio asks of a loop ---------------------------------------------------------------------------------

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> Any:
        timer = Timer(self._now, callback, args, self.strand, context)
        if not self._closing:
            self._push(timer.when_, timer)
        return timer

    def call_later(self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None) -> Any:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None) -> Any:
        timer = Timer(when, callback, args, self.strand, context)
        if not self._closing:
            self._push(when, timer)
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def spawn(self, strand: Strand | None, coro: Coroutine[Any, Any, object]) -> asyncio.Task[Any]:
        """A task on `strand` that nobody waits for: what it raises ends the simulation."""
        with self.running(strand):
            task = self.create_task(coro)
            task.add_done_callback(_raise)
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._closing:
            raise context.get("exception") or Violation(context.get("message", "defect in a task"))

    # --- the beginning and the end -----------------------------------------------------------------------------------

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, it is the running loop of this thread; at the end every task of it is ended, unheard."""
        events._set_running_loop(self)
        try:
            yield
        finally:
            self._end_tasks()
            events._set_running_loop(None)

    def _end_tasks(self) -> None:
        """A pending task would run its `finally` blocks whenever it is collected; so they run here, unheard."""
        self._closing = True
        self._heap.clear()
        while self._tasks:
            task = self._tasks.pop()
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            _close(task.get_coro())


def _close(coroutine: Any) -> None:
    """A `finally` block that waits for something is ended at the next place."""
    for _ in range(20):
        try:
            coroutine.close()
        except BaseException:  # noqa: BLE001 - the simulation is over: last words count nothing
            continue
        return


def _raise(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error

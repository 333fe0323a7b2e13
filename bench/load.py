"""Puts a workload on an endpoint and keeps what its clients saw."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from bench.client import CompletionClient, Timeline
from bench.workload import Arrivals, Prompts, Steady, Workload

ANSWER_SECONDS = 60.0
"""Long prompts that were sent in the window may take so much longer, under unchanged load, to be answered."""
ERROR_PAUSE_SECONDS = 0.1
"""A steady stream whose request failed waits so long: a dead endpoint is not to be hammered."""

SHORT, LONG = "short", "long"


class Observed(msgspec.Struct, frozen=True):
    """All requests of a run, those of the warm-up too; [start, end) is the window that counts (monotonic clock)."""

    timelines: list[Timeline]
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def sent(self, stream: str) -> list[Timeline]:
        """Requests of `stream` (`SHORT` or `LONG`) that were sent in the window."""
        return [line for line in self.timelines if line.stream == stream and self.start <= line.sent_at < self.end]

    @property
    def prompt_tokens(self) -> int:
        """Of the prompts whose first token came in the window: of what was computed in it, nearly."""
        answered = [line for line in self.timelines if line.arrivals and self.start <= line.arrivals[0] < self.end]
        return sum(line.prompt_tokens for line in answered)

    def by(self, clock: Callable[[float], float]) -> Observed:
        """The same by another clock, see `Timeline.by`."""
        return Observed([line.by(clock) for line in self.timelines], clock(self.start), clock(self.end))

    @property
    def errors(self) -> list[str]:
        return [line.error for line in self.timelines if line.error is not None]


class LoadGenerator:
    """Plays one workload, once. Belongs to one event loop."""

    def __init__(self, workload: Workload, client: CompletionClient, prompts: Prompts) -> None:
        self._workload = workload
        self._client = client
        self._prompts = prompts
        self._timelines: list[Timeline] = []
        self._open_long: set[asyncio.Task[Timeline]] = set()
        """Long prompts that are not answered yet."""

    async def run(self, mark: Callable[[str], None] = lambda edge: None) -> Observed:
        """Plays it to its end. `mark` is called with "start" and "end" at the edges of the measured window."""
        workload = self._workload
        tasks = [asyncio.create_task(self._read_on(index, workload.steady)) for index in range(workload.steady.streams)]
        if workload.long is not None:
            tasks.append(asyncio.create_task(self._arrive(workload.long)))
        try:
            await asyncio.sleep(workload.warm_up_seconds)
            mark("start")
            start = time.monotonic()
            await asyncio.sleep(workload.seconds)
            end = time.monotonic()
            mark("end")
            observed = Observed(self._timelines, start, end)
            if self._open_long:
                await asyncio.wait(self._open_long, timeout=ANSWER_SECONDS)
        finally:
            running = [*tasks, *self._open_long]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return observed

    async def _read_on(self, index: int, steady: Steady) -> None:
        """One steady stream."""
        number = 0
        tokens = steady.first_output_tokens(index)
        while True:
            prompt = self._prompts.prompt(f"steady-{index}", number, steady.prompt_tokens)
            timeline = await self._ask(SHORT, prompt, tokens)
            if timeline.error is not None:
                await asyncio.sleep(ERROR_PAUSE_SECONDS)
            number, tokens = number + 1, steady.output_tokens

    async def _arrive(self, long: Arrivals) -> None:
        """Sends at start, start + period, ... : late answers do not hold back later requests."""
        begun = time.monotonic()
        number = 0
        while True:
            prompt = self._prompts.prompt("long", number, long.prompt_tokens)
            task = asyncio.create_task(self._ask(LONG, prompt, long.output_tokens))
            self._open_long.add(task)
            task.add_done_callback(self._open_long.discard)
            number += 1
            await asyncio.sleep(begun + number * long.period_seconds - time.monotonic())

    async def _ask(self, stream: str, prompt: list[int], tokens: int) -> Timeline:
        timeline = Timeline(stream=stream, prompt_tokens=len(prompt), sent_at=time.monotonic())
        self._timelines.append(timeline)
        await self._client.stream(timeline, prompt, tokens)
        return timeline

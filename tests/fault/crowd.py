"""The clients of a campaign: so many streams at a time, each answer judged when it is there."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import aiohttp

from tests.fault.answers import Answer, Verdict, judge
from tests.fault.questions import Question
from tests.fault.reading import Outage, Reading
from tests.fault.watch import NO_OUTAGE

FAILED_SECONDS = 1.0
"""A stream whose request went wrong waits so long: who is refused at once would fail a hundred times a second."""


class Judged(NamedTuple):
    """A request that has ended; `verdict` is None for one that got what it should."""

    reading: Reading
    verdict: Verdict | None
    reason: str


class Crowd:
    """Streams that ask one question after the other while `of` runs; belongs to one event loop."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        questions: Sequence[Question],
        answers: Mapping[str, Answer],
        outage: Outage,
        seed: int,
    ) -> None:
        """`answers` are the right ones, by question."""
        self.judged: list[Judged] = []
        self.begun = 0.0
        """Of the monotonic clock, as all times of readings are."""
        self.open: list[Reading] = []
        """Being read now, oldest first."""
        self._session = session
        self._url = url
        self._questions = questions
        self._answers = answers
        self._outage = outage
        self._seed = seed
        self._closing = False

    @property
    def failures(self) -> list[Judged]:
        return [each for each in self.judged if each.verdict is not None]

    @asynccontextmanager
    async def of(self, streams: int) -> AsyncIterator[None]:
        """They ask while the block runs; leaving it waits for what is still being answered."""
        self.begun = time.monotonic()
        tasks = [asyncio.create_task(self._ask_on(number)) for number in range(streams)]
        try:
            yield
            self._closing = True
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_on(self, stream: int) -> None:
        draw = random.Random(f"{self._seed}/{stream}")
        number = 0
        while not self._closing:
            reading = Reading(f"fault-{self._seed}-{stream}-{number}", draw.choice(self._questions))
            judged = await self._ask(reading)
            number += 1
            if judged.verdict is not None:
                await asyncio.sleep(FAILED_SECONDS)

    async def _ask(self, reading: Reading) -> Judged:
        self.open.append(reading)
        try:
            await reading.read(self._session, self._url, self._outage)
        finally:
            self.open.remove(reading)
        wrong = judge(reading.answer, self._answers[reading.question.name])
        if reading.error is not None:
            judged = Judged(reading, Verdict.FAILED, reading.error)
        elif wrong is not None:
            judged = Judged(reading, *wrong)
        else:
            judged = Judged(reading, None, "")
        self.judged.append(judged)
        return judged


async def ask_in_peace(
    session: aiohttp.ClientSession, url: str, questions: Sequence[Question], at_once: int
) -> dict[str, Answer]:
    """The right answers, by question: from a cluster that nothing happens to."""
    turn = asyncio.Semaphore(at_once)

    async def ask(question: Question) -> Answer:
        async with turn:
            reading = Reading(f"peace-{question.name}", question)
            await reading.read(session, url, NO_OUTAGE)
        assert reading.error is None, f"{question.name}: {reading.error}"
        return reading.answer

    answers = await asyncio.gather(*(ask(question) for question in questions))
    return {question.name: answer for question, answer in zip(questions, answers, strict=True)}

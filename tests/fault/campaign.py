"""Faults, one after the other in each of three lanes, while a crowd reads: aimed at moments of requests' journeys."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

import aiohttp

from bench.cluster import Cluster
from cluster.messages import Role
from tests.fault.crowd import Crowd
from tests.fault.hands import Hands
from tests.fault.plan import DEATHS, Fault, Kind, Lane, Moment
from tests.fault.questions import long_question
from tests.fault.reading import Reading
from tests.fault.watch import POLL_SECONDS, RequestRecord, RouterOutage, Watch

AIM_SECONDS = 20.0
"""For so long a moment is waited for; then the fault comes anyway."""
RANDOM_SECONDS = 2.0
"""A fault that is aimed at nothing comes within so long."""
GLANCE_SECONDS = 0.003
RECORD_SECONDS = 0.02
"""Between two looks at the records of those who wait for their first token."""
WHOLE_SECONDS = 90.0
"""A worker, a router or bootstrap that is not back by then does not come back."""
Found = TypeVar("Found")
HOUSEHOLD = {Kind.KILL_ROUTER: "router", Kind.KILL_BOOTSTRAP: "bootstrap"}


class Strike(NamedTuple):
    """A fault that happened."""

    fault: Fault
    victim: str
    at: float
    """Of the monotonic clock."""
    hit: Moment | None
    """Where the request stood that it was aimed at; None: it was not aimed, or no such moment came."""
    reading: str | None
    """That request."""


class Aim(NamedTuple):
    reading: Reading
    worker: str
    moment: Moment


class NotWhole(Exception):
    """What was struck did not come back."""


class Campaign:
    """Plays the faults of all lanes on one cluster. `strikes` has what was done."""

    def __init__(
        self,
        cluster: Cluster,
        session: aiohttp.ClientSession,
        crowd: Crowd,
        outage: RouterOutage,
        watch: Watch,
        corpus: Sequence[int],
        tell: Callable[[str], None],
    ) -> None:
        """`corpus`: what prompts are cut from. `tell` hears of each fault, as it happens."""
        self.strikes: list[Strike] = []
        self._url = cluster.url
        self._session = session
        self._crowd = crowd
        self._outage = outage
        self._watch = watch
        self._hands = Hands(cluster)
        self._corpus = corpus
        self._tell = tell
        self._records: dict[str, RequestRecord] = {}
        """Of readings without a token, as last seen."""

    async def play(self, plan: dict[Lane, list[Fault]], seed: int) -> None:
        """Raises `NotWhole`."""
        looking = asyncio.create_task(self._look_at_records())
        lanes = [asyncio.create_task(self._lane(lane, plan[lane], random.Random(f"{seed}/{lane}"))) for lane in plan]
        try:
            await asyncio.gather(*lanes)
        finally:
            for task in (looking, *lanes):
                task.cancel()
            await asyncio.gather(looking, *lanes, return_exceptions=True)

    async def _lane(self, lane: Lane, faults: Sequence[Fault], draw: random.Random) -> None:
        for fault in faults:
            if lane.role is None:
                await self._strike_house(fault, draw)
            else:
                await self._strike_worker(fault, lane.role, draw)

    # --- strikes -----------------------------------------------------------------------------------------------------

    async def _strike_worker(self, fault: Fault, role: Role, draw: random.Random) -> None:
        before = await self._until(lambda: self._watch.pool(role), f"all {role.value} workers are there")
        aim = await self._aim(fault.moment, role, draw)
        victim = draw.choice(sorted(before)) if aim is None else aim.worker
        self._note(fault, victim, aim)
        await self._hands.strike(fault.kind, victim)

        async def back() -> bool:
            epochs = await self._watch.pool(role)
            return epochs is not None and (fault.kind not in DEATHS or epochs[victim] != before[victim])

        await self._until(back, f"{victim} is back after {fault}")

    async def _strike_house(self, fault: Fault, draw: random.Random) -> None:
        aim = await self._aim(fault.moment, Role.DECODE, draw)
        if fault.kind is Kind.KILL_ROUTER:
            self._outage.begins()
        victim = HOUSEHOLD[fault.kind]
        self._note(fault, victim, aim)
        await self._hands.strike(fault.kind, victim)
        back = self._watch.serves if fault.kind is Kind.KILL_ROUTER else self._watch.knows_all
        await self._until(back, f"{victim} is back after {fault}")
        if fault.kind is Kind.KILL_ROUTER:
            self._outage.ends()

    def _note(self, fault: Fault, victim: str, aim: Aim | None) -> None:
        found = (None, None) if aim is None else (aim.moment, aim.reading.name)
        strike = Strike(fault, victim, time.monotonic(), *found)
        self.strikes.append(strike)
        failed = len(self._crowd.failures)
        where = "" if aim or fault.moment is Moment.ANY else ", which did not come"
        self._tell(
            f"{strike.at - self._crowd.begun:6.1f} s  fault {len(self.strikes)}: {fault}{where}: {victim}; "
            f"{len(self._crowd.judged)} requests have ended, {failed} of them wrongly"
        )

    async def _until(self, look: Callable[[], Awaitable[Found | None]], what: str) -> Found:
        """Looks until something is found. Raises `NotWhole`."""
        deadline = time.monotonic() + WHOLE_SECONDS
        while not (found := await look()):
            if time.monotonic() > deadline:
                raise NotWhole(f"not within {WHOLE_SECONDS:g} s: {what}")
            await asyncio.sleep(POLL_SECONDS)
        return found

    # --- aims --------------------------------------------------------------------------------------------------------

    async def _aim(self, moment: Moment, role: Role, draw: random.Random) -> Aim | None:
        """Returns at that moment of some request's journey, with the worker that has it; None: it did not come, or
        nothing was to be aimed at."""
        if moment is Moment.ANY:
            await asyncio.sleep(draw.uniform(0, RANDOM_SECONDS))
            return None
        ways: dict[Moment, Callable[[], Awaitable[Aim | None]]] = {
            Moment.PLACED: lambda: self._without_token(Moment.PLACED, role),
            Moment.COMPUTING: lambda: self._without_token(Moment.COMPUTING, role),
            Moment.HANDING_OVER: lambda: self._with_one_token(role),
            Moment.DECODING: lambda: self._decoding(role, draw),
            Moment.ENDED: lambda: self._ending(role, draw),
            Moment.LEFT: lambda: self._leaving(role, draw),
        }
        deadline = time.monotonic() + AIM_SECONDS
        while time.monotonic() < deadline:
            aim = await ways[moment]()
            if aim is not None:
                return aim
            await asyncio.sleep(GLANCE_SECONDS)
        return None

    async def _without_token(self, moment: Moment, role: Role) -> Aim | None:
        for reading in reversed(self._crowd.open):
            record = self._records.get(reading.name)
            if record is not None and not reading.begun and record.moment is moment:
                return _aim_at(reading, record, role, moment)
        return None

    async def _with_one_token(self, role: Role) -> Aim | None:
        for reading in reversed(self._crowd.open):
            record = self._records.get(reading.name)
            if record is not None and reading.answer.tokens == 1:
                return _aim_at(reading, record, role, Moment.HANDING_OVER)
        return None

    async def _decoding(self, role: Role, draw: random.Random) -> Aim | None:
        reading = draw.choice(self._crowd.open) if self._crowd.open else None
        if reading is None or any(len(arrivals) < 2 for arrivals in reading.arrivals):
            return None
        record = await self._watch.record(reading)
        if record is None or reading.ended_at is not None:
            return None
        return _aim_at(reading, record, role, Moment.DECODING)

    async def _ending(self, role: Role, draw: random.Random) -> Aim | None:
        aim = await self._decoding(role, draw)
        while aim is not None and aim.reading.ended_at is None:  # noqa: ASYNC110 - three lanes look at many readings
            await asyncio.sleep(GLANCE_SECONDS)
        return None if aim is None else aim._replace(moment=Moment.ENDED)

    async def _leaving(self, role: Role, draw: random.Random) -> Aim | None:
        """A client of our own asks, and leaves as soon as its prompt is computed."""
        reading = Reading(f"leaves-{draw.randrange(2**32)}", long_question(draw, self._corpus))
        asking = asyncio.create_task(reading.read(self._session, self._url, self._outage))
        try:
            record = None
            while not asking.done() and (record is None or record.queue_seconds is None):
                await asyncio.sleep(RECORD_SECONDS)
                record = await self._watch.record(reading)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        return None if record is None else _aim_at(reading, record, role, Moment.LEFT)

    async def _look_at_records(self) -> None:
        while True:
            waiting = [reading for reading in self._crowd.open if not reading.begun]
            for reading in waiting:
                record = await self._watch.record(reading)
                if record is not None:
                    self._records[reading.name] = record
            open_names = {reading.name for reading in self._crowd.open}
            self._records = {name: record for name, record in self._records.items() if name in open_names}
            await asyncio.sleep(RECORD_SECONDS)


def _aim_at(reading: Reading, record: RequestRecord, role: Role, moment: Moment) -> Aim | None:
    worker = record.worker(role)
    return None if worker is None else Aim(reading, worker, moment)

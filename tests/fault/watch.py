"""What can be seen of a cluster from outside while faults happen to it: its workers, and where each request stands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Final

import aiohttp
import msgspec

from cluster.messages import Load, Role
from tests.fault.plan import Moment
from tests.fault.reading import Outage, Reading

PROBE_SECONDS = 2.0
POLL_SECONDS = 0.1
WORKERS_OF_A_POOL = 2


class AttemptRecord(msgspec.Struct, frozen=True):
    """One attempt at a choice, by the router's record of the request; times are seconds since the request's arrival."""

    prefill_worker: str | None
    decode_worker: str | None
    placed_seconds: float
    ended_seconds: float | None
    tokens: int
    end: str | None
    error: str | None
    blame: str | None


class ChoiceRecord(msgspec.Struct, frozen=True):
    queue_seconds: float | None
    first_token_seconds: float | None
    prefill_worker: str | None
    decode_worker: str | None
    history: list[AttemptRecord]

    def worker(self, role: Role) -> str | None:
        return self.prefill_worker if role is Role.PREFILL else self.decode_worker

    @property
    def moment(self) -> Moment:
        """While it has no token yet."""
        return Moment.PLACED if self.queue_seconds is None else Moment.COMPUTING


class RequestRecord(ChoiceRecord, frozen=True):
    choices: list[ChoiceRecord]


class WorkerStatus(msgspec.Struct, frozen=True):
    worker: str
    role: Role
    epoch: int
    live: bool
    attempts: int
    load: Load


class Status(msgspec.Struct, frozen=True):
    """The router's `GET /status`."""

    in_flight: int
    integrity_errors: list[str]
    workers: list[WorkerStatus]

    def ready(self, role: Role) -> dict[str, int]:
        """The epochs of the workers that can take work."""
        return {each.worker: each.epoch for each in self.workers if each.role is role and each.live and each.load.ready}

    @property
    def at_rest(self) -> bool:
        return self.in_flight == 0 and not self.integrity_errors and not any(each.attempts for each in self.workers)


class Watch:
    """Asks the router and bootstrap; one that does not answer gives None."""

    def __init__(self, session: aiohttp.ClientSession, url: str, bootstrap_url: str) -> None:
        self._session = session
        self._url = url
        self._bootstrap_url = bootstrap_url

    async def status(self) -> Status | None:
        body = await self._get(f"{self._url}/status")
        return None if body is None else msgspec.json.decode(body, type=Status)

    async def record(self, reading: Reading) -> RequestRecord | None:
        body = await self._get(f"{self._url}/v1/requests/{reading.name}")
        return None if body is None else msgspec.json.decode(body, type=RequestRecord)

    async def records(self, readings: Iterable[Reading]) -> dict[str, RequestRecord]:
        """By request; without those that this router does not know."""
        found = {reading.name: await self.record(reading) for reading in readings}
        return {name: record for name, record in found.items() if record is not None}

    async def knows_all(self) -> bool:
        """Whether bootstrap knows every worker that the router uses."""
        body, status = await self._get(f"{self._bootstrap_url}/workers"), await self.status()
        if body is None or status is None:
            return False
        members = {each["member"]["worker"] for each in msgspec.json.decode(body)["workers"]}
        return bool(members) and members >= {each.worker for each in status.workers if each.live}

    async def serves(self) -> bool:
        """Whether the router would take a request now."""
        return await self._get(f"{self._url}/health") is not None

    async def pool(self, role: Role) -> dict[str, int] | None:
        """The epochs of its workers, if all can take work."""
        status = await self.status()
        ready = status.ready(role) if status is not None else {}
        return ready if len(ready) == WORKERS_OF_A_POOL else None

    async def _get(self, url: str) -> bytes | None:
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(PROBE_SECONDS)) as response:
                return await response.read() if response.status == 200 else None
        except (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError):
            return None


class RouterOutage:
    """When the router was away: between `begins` and `ends` its clients may lose connections, or find nobody."""

    def __init__(self) -> None:
        self._away = False
        self._last_end = float("-inf")

    def begins(self) -> None:
        self._away = True

    def ends(self) -> None:
        self._away, self._last_end = False, time.monotonic()

    def since(self, moment: float) -> bool:
        """Whether it was away at some time from `moment` on."""
        return self._away or self._last_end > moment


class _NoOutage:
    def since(self, moment: float) -> bool:
        return False


NO_OUTAGE: Final[Outage] = _NoOutage()
"""Of a router that is there all the time."""

"""The router's own record of a request, `GET /v1/requests/{id}`: where its time went. A Baton extension."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp
import msgspec

from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings


class Record(msgspec.Struct, frozen=True):
    """The fields that the benchmarks read; the router sends more. None where the request had no such leg (yet)."""

    id: str
    prefill: PrefillTimings | None = None
    handoff: HandoffTimings | None = None
    decode: DecodeTimings | None = None

    @property
    def prefilled(self) -> PrefillTimings | None:
        """Wherever it was prefilled: by a prefill worker, or by a unified decode worker itself."""
        return self.prefill or (self.decode.prefill if self.decode is not None else None)


async def fetch_records(session: aiohttp.ClientSession, url: str, ids: Sequence[str]) -> list[Record]:
    """The records of `ids`; those that the endpoint does not have (any more, or at all) are left out."""
    found = await asyncio.gather(*(_fetch(session, url, each) for each in ids))
    return [record for record in found if record is not None]


async def _fetch(session: aiohttp.ClientSession, url: str, request: str) -> Record | None:
    async with session.get(f"{url.rstrip('/')}/v1/requests/{request}") as response:
        if response.status != 200:
            return None
        return msgspec.json.decode(await response.read(), type=Record)

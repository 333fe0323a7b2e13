"""Clients that ask a cluster of metronomes again and again, and look at every token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

from tests.kubernetes.stand_ins.metronome import token
from tests.process.api import Api, StreamError

TOKENS = 40
"""Of one answer; with a metronome's beat, two seconds."""


@dataclass
class Account:
    """What has become of the requests so far."""

    whole: int = 0
    wrong: list[str] = field(default_factory=list)
    told: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def more(self, count: int) -> None:
        """Waits for so many further answers, or for a wrong one."""
        wanted = self.whole + count
        async with self.told:
            await self.told.wait_for(lambda: self.whole >= wanted or self.wrong)

    async def add(self, wrong: str | None) -> None:
        async with self.told:
            if wrong is None:
                self.whole += 1
            else:
                self.wrong.append(wrong)
            self.told.notify_all()


@asynccontextmanager
async def reading(api: Api, readers: int) -> AsyncIterator[Account]:
    """So many at a time, inside of the block; at its end, each reads its last answer to the end."""
    account, over = Account(), asyncio.Event()
    tasks = [asyncio.create_task(_read(api, random.Random(number), account, over)) for number in range(readers)]
    try:
        yield account
    finally:
        over.set()
        await asyncio.gather(*tasks)


async def _read(api: Api, draw: random.Random, account: Account, over: asyncio.Event) -> None:
    while not over.is_set():
        prompt = [draw.randrange(1000, 2000) for _ in range(8)]
        await account.add(await _wrong(api, prompt))


async def _wrong(api: Api, prompt: list[int]) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    try:
        got = await api.stream(prompt, max_tokens=TOKENS, temperature=0, ignore_eos=True)
    except (StreamError, aiohttp.ClientError, asyncio.TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    expected = [token(prompt, offset) for offset in range(TOKENS)]
    if got.tokens == expected and got.finish_reason == "length":
        return None
    return f"{got.tokens} instead of {expected}, finished by {got.finish_reason}"

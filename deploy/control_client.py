"""The `Cluster` of a `baton up` that is another process, see `deploy.control`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import aiohttp
import msgspec

from cluster.errors import LaunchError, NotFound, from_info
from deploy.control import News, Order
from deploy.launchers.base import Replica, Sizes
from deploy.log_files import log_file, read_log
from deploy.run_directory import Running

_URL = "http://baton"
_POLL_SECONDS = 0.1


class RemoteCluster:
    """A `Cluster`. `http` is a session over the socket; it belongs to the caller."""

    def __init__(
        self, http: aiohttp.ClientSession, running: Running, tell: Callable[[str], None], patience_seconds: float
    ) -> None:
        self._http = http
        self._running = running
        self._tell = tell
        self._patience = patience_seconds

    async def status(self) -> list[Replica]:
        try:
            async with self._http.get(f"{_URL}/replicas") as response:
                return msgspec.json.decode(await response.read(), type=list[Replica])
        except (aiohttp.ClientError, OSError) as error:
            raise _gone(error) from error

    async def scale(self, sizes: Sizes) -> None:
        await self._order("scale", Order(sizes=dict(sizes), patience_seconds=self._patience))

    async def drain(self, workers: Sequence[str]) -> None:
        await self._order("drain", Order(workers=list(workers), patience_seconds=self._patience))

    async def restart(self, workers: Sequence[str]) -> None:
        await self._order("restart", Order(workers=list(workers), patience_seconds=self._patience))

    async def logs(self, name: str, lines: int, *, follow: bool) -> AsyncGenerator[str, None]:
        known = [replica.name for replica in await self.status()]
        if name not in known:
            raise NotFound(f"nothing of the name {name} runs; known: {', '.join(known)}")
        async for line in read_log(log_file(self._running.directory, name), lines, follow=follow):
            yield line

    async def stop(self, grace_seconds: float) -> None:
        """The grace is what the topology says: `baton up` stops as by Ctrl-C."""
        try:
            async with self._http.post(f"{_URL}/stop"):
                pass
        except (aiohttp.ClientError, OSError):
            return
        while self._running.directory.is_symlink():  # noqa: ASYNC110 - a file: no event tells of its end
            await asyncio.sleep(_POLL_SECONDS)

    async def _order(self, what: str, order: Order) -> None:
        try:
            async with self._http.post(f"{_URL}/{what}", data=msgspec.json.encode(order)) as response:
                if response.status != 200:
                    raise LaunchError(f"`baton up` does not understand: {await response.text()}")
                async for line in response.content:
                    news = msgspec.json.decode(line, type=News)
                    if news.line:
                        self._tell(news.line)
                    if news.error is not None:
                        raise from_info(news.error)
                    if news.done:
                        return
        except (aiohttp.ClientError, OSError) as error:
            raise _gone(error) from error
        raise LaunchError(f"`baton up` ended before it was done with: {what}")


def _gone(error: Exception) -> LaunchError:
    return LaunchError(f"`baton up` does not answer: {str(error) or type(error).__name__}")


@asynccontextmanager
async def connect(
    running: Running, tell: Callable[[str], None], patience_seconds: float
) -> AsyncIterator[RemoteCluster]:
    """Its cluster. What it does takes as long as workers do: nothing here has a limit of its own."""
    connector = aiohttp.UnixConnector(str(running.socket))
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as http:
        yield RemoteCluster(http, running, tell, patience_seconds)

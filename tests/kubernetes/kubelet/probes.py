"""Startup, readiness and liveness of a container, asked over HTTP or by a command inside of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import aiohttp

from tests.kubernetes.kubelet.api import Json

Execute = Callable[[Sequence[str]], Awaitable[bool]]


class Prober:
    """For one life of a container."""

    def __init__(self, spec: Json, execute: Execute, address: str) -> None:
        self._spec = spec
        self._execute = execute
        self._address = address

    async def until_it_must_die(self, started: Callable[[], None], ready: Callable[[bool], None]) -> None:
        """Returns when it has not started in time, or does not live any more. Tells of the start, if there is a probe
        for it, and of readiness, again and again."""
        startup = self._spec.get("startupProbe")
        if startup is not None:
            if not await self._until(startup, wanted=True):
                return
            started()
        asking = asyncio.create_task(self._tell_readiness(ready))
        try:
            liveness = self._spec.get("livenessProbe")
            if liveness is None:
                await asyncio.Event().wait()
            else:
                await self._until(liveness, wanted=False)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _until(self, probe: Json, *, wanted: bool) -> bool:
        """Until it has succeeded (if that is `wanted`), or has failed too often in a row. Returns whether the last one
        succeeded."""
        failures = 0
        await asyncio.sleep(probe.get("initialDelaySeconds", 0))
        while True:
            succeeded = await self._ask(probe)
            failures = 0 if succeeded else failures + 1
            if (succeeded and wanted) or failures >= probe.get("failureThreshold", 3):
                return succeeded
            await asyncio.sleep(probe.get("periodSeconds", 10))

    async def _tell_readiness(self, ready: Callable[[bool], None]) -> None:
        probe = self._spec.get("readinessProbe")
        if probe is None:
            return
        in_a_row, last = 0, False
        await asyncio.sleep(probe.get("initialDelaySeconds", 0))
        while True:
            now = await self._ask(probe)
            in_a_row, last = in_a_row + 1 if now == last else 1, now
            if in_a_row >= probe.get("successThreshold" if now else "failureThreshold", 1 if now else 3):
                ready(now)
            await asyncio.sleep(probe.get("periodSeconds", 10))

    async def _ask(self, probe: Json) -> bool:
        return await answers(probe, self._execute, self._address, self._spec, probe.get("timeoutSeconds", 1))


async def answers(handler: Json, execute: Execute, address: str, spec: Json, seconds: float | None) -> bool:
    """Whether a probe or a hook succeeds, within `seconds`."""
    try:
        if "exec" in handler:
            return await asyncio.wait_for(execute(handler["exec"]["command"]), seconds)
        if "tcpSocket" in handler:
            port = _port(handler["tcpSocket"]["port"], spec)
            _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), seconds)
            writer.close()
            return True
        get = handler["httpGet"]
        url = f"{get.get('scheme', 'http').lower()}://{address}:{_port(get['port'], spec)}{get.get('path', '/')}"
        timeout = aiohttp.ClientTimeout(seconds)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(url, ssl=False, allow_redirects=False) as response,
        ):
            return response.status < 400
    except (OSError, aiohttp.ClientError, asyncio.TimeoutError):
        return False


def _port(port: int | str, spec: Json) -> int:
    """A port may be told by its name."""
    if isinstance(port, int):
        return port
    return next(int(each["containerPort"]) for each in spec["ports"] if each.get("name") == port)

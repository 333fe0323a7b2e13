"""A router in this process, with a real bootstrap and fake workers around it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import aiohttp
import msgspec
from aiohttp import web

from bootstrap.server import BootstrapServer
from cluster.clock import MonotonicClock
from cluster.config import Bootstrap, Decode, Model, Prefill, Router, Topology
from cluster.messages import Role
from cluster.model_files import resolve_model
from router.server import RouterServer
from router.text.model_text import ModelText, load_model_text
from tests.process.fake_worker import FakeWorker

MODEL = "fake"
BOUND_SECONDS = 10.0


class House:
    """`async with House(text, workers) as house`; then `house.url` serves."""

    def __init__(
        self,
        text: ModelText,
        workers: list[FakeWorker],
        *,
        unified: bool = False,
        lease_seconds: float = 10.0,
        **router,
    ) -> None:
        self.workers = {worker.name: worker for worker in workers}
        self._text = text
        self._unified = unified
        self._lease_seconds = lease_seconds
        self._router = router
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> House:
        self.session = await self._stack.enter_async_context(aiohttp.ClientSession())
        bootstrap = Bootstrap(port=0, heartbeat_seconds=0.1, lease_seconds=self._lease_seconds)
        runner = web.AppRunner(BootstrapServer(bootstrap, MonotonicClock()).application(), shutdown_timeout=0.01)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.stop_bootstrap = runner.cleanup
        port = runner.addresses[0][1]
        topology = Topology(
            model=Model(path=MODEL),
            bootstrap=msgspec.structs.replace(bootstrap, port=port),
            router=Router(port=0, **self._router),
            prefill=Prefill(replicas=0 if self._unified else 1),
            decode=Decode(replicas=1),
        )
        self._bootstrap_url = topology.bootstrap_url
        self.server = RouterServer(topology, self._text, self.session)
        self.url = await self.server.start()
        self.running = asyncio.create_task(self.server.run())
        self._stack.push_async_callback(self._stop)
        for worker in list(self.workers.values()):
            await self.add(worker)
        await self.until(lambda: self.live() == set(self.workers))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def add(self, worker: FakeWorker) -> None:
        self.workers[worker.name] = worker
        await worker.start(self.session, self._bootstrap_url)
        self._stack.push_async_callback(worker.close)

    async def _stop(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.server.stop()

    def live(self) -> set[str]:
        return {status.worker for status in self.server.fleet.statuses() if status.live}

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition` holds; fails after a bound."""
        async with Bound():
            while not condition():  # noqa: ASYNC110 - conditions are of many kinds
                await asyncio.sleep(0.005)

    async def until_idle(self) -> None:
        """Every leg is over, on both sides, and the accounts are at zero."""
        await self.until(lambda: self.server.dispatcher.in_flight == 0)
        await self.until(lambda: not any(worker.running for worker in self.workers.values()))
        assert self.server.fleet.integrity_errors() == []
        assert [status.attempts for status in self.server.fleet.statuses()] == [0] * len(self.server.fleet.statuses())

    # --- requests ----------------------------------------------------------------------------------------------------

    async def post(self, path: str, **body) -> tuple[int, dict]:
        async with self.session.post(self.url + path, json={"model": MODEL, **body}) as response:
            return response.status, await response.json()

    async def complete(self, **body) -> dict:
        status, answer = await self.post("/v1/completions", **{"prompt": "hello", **body})
        assert status == 200, answer
        return answer

    async def chat(self, **body) -> dict:
        messages = [{"role": "user", "content": "hello"}]
        status, answer = await self.post("/v1/chat/completions", **{"messages": messages, **body})
        assert status == 200, answer
        return answer

    async def events(
        self, path: str = "/v1/completions", *, once_begun: Callable[[], None] = lambda: None, **body
    ) -> list[str]:
        """The data of a stream's events, the last one included; no comments. `once_begun` is called after the first."""
        default = {} if "messages" in body else {"prompt": "hello"}
        body = {"model": MODEL, "stream": True, **default, **body}
        async with self.session.post(self.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            text = (await response.content.readline()).decode()
            once_begun()
            text += (await response.read()).decode()
        assert text.endswith("\n\n")
        lines = text.removesuffix("\n\n").split("\n")
        return [line.removeprefix("data: ") for line in lines if line and not line.startswith(":")]

    async def get(self, path: str) -> tuple[int, dict]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.json()


class Bound:
    """Fails its block when that takes too long."""

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._timer = asyncio.get_running_loop().call_later(BOUND_SECONDS, task.cancel, "took too long")

    async def __aexit__(self, *error: object) -> None:
        self._timer.cancel()


def pair(prefill=None, decode=None) -> list[FakeWorker]:
    """One prefill and one decode worker with these behaviours."""
    return [FakeWorker("prefill-0", Role.PREFILL, 11, prefill), FakeWorker("decode-0", Role.DECODE, 21, decode)]


def demo_text() -> ModelText:
    """The demo model's tokenizer and template; a second to load, so once per module."""
    return load_model_text(resolve_model("smollm2-135m-instruct"))

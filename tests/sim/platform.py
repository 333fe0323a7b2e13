"""What the real control plane finds in place of the operating system: ports, processes, signals, kernels, time.

`installed` puts these below the modules that use them. Each of them finds its simulation by the running event loop, and
the process it acts for by the strand that is running.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

from aiohttp import web

from cluster.access.security import ClusterSecurity
from cluster.messages import ProcessIdentity
from cluster.tasks import first_of
from kv_transfer.receiver import HandoffReceiver
from tests.sim import network
from tests.sim.engines import EngineLife, SimEngineHost
from tests.sim.kernel import SimLoop, Strand
from tests.sim.network import Session, SimLink


class SimRequest(NamedTuple):
    """What a handler gets of a WebSocket request: its end of the link, by `accept`."""

    link: SimLink


Handler = Callable[[Any], Awaitable[object]]


def running_loop() -> SimLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SimLoop)
    return loop


def running_strand() -> Strand:
    strand = running_loop().strand
    assert strand is not None
    return strand


async def accept(request: Any) -> SimLink:
    """In place of `cluster.links.accept`."""
    link: SimLink = request.link
    return link


async def serve_application(link_path: str, link: SimLink, handlers: dict[str, Handler]) -> None:
    await handlers[f"/{link_path}"](SimRequest(link))


def handlers_of(app: web.Application) -> dict[str, Handler]:
    """Of an application's paths."""
    routes = list(app.router.routes())
    return {route.resource.canonical: route.handler for route in routes if route.resource is not None}


class Silence:
    """In place of metrics: whatever is asked of it, it does nothing."""

    def __init__(self, *labels: object) -> None:
        """Takes what the metrics take."""

    def __getattr__(self, name: str) -> Silence:
        return self

    def __call__(self, *args: object, **keywords: object) -> Silence:
        return self


class SimHttpServer:
    """In place of `cluster.http_server.HttpServer`: listens in the simulated network, under its host's name."""

    def __init__(self, app: web.Application, *settings: object) -> None:
        self._app = app
        self._handlers: dict[str, Handler] = {}

    async def start(self, host: str, port: int, advice: str) -> str:
        self._handlers = handlers_of(self._app)
        running_loop().cluster.network.listen(host, running_strand(), self._serve)
        return f"http://{host}"

    async def stop(self) -> None:
        """Its process ends with it."""

    async def _serve(self, path: str, link: SimLink) -> None:
        await serve_application(path, link, self._handlers)


@asynccontextmanager
async def session(security: ClusterSecurity) -> AsyncIterator[Session]:
    """In place of `ClusterSecurity.session`."""
    loop, strand = running_loop(), running_strand()
    yield Session(loop.cluster.network, strand, strand.host)


async def run_until_stopped(*tasks: asyncio.Future[None], leave: Callable[[], None]) -> None:
    """In place of `cluster.server_process.run_until_stopped`. A process's SIGTERM is its strand's event `asked`."""

    async def stop(asked: asyncio.Event) -> None:
        await asked.wait()
        leave()
        await asyncio.Event().wait()

    await first_of(asyncio.ensure_future(stop(running_strand().asked_to_end)), *tasks)


class _EngineHosts:
    """In place of the class `EngineHost`. The engine command of a simulated worker is how to start one."""

    @staticmethod
    async def start(start: Any, loading: Callable[[], float], environment: object, ranks: int) -> SimEngineHost:
        return SimEngineHost(running_strand(), start, loading())


def _starting() -> EngineLife:
    """The engine process that is being built."""
    return running_loop().cluster.lives[-1]


def _is_dead(process: ProcessIdentity) -> bool:
    """In place of `cluster.process_identity.is_dead`: a kernel knows of its own machine's processes only."""
    cluster = running_loop().cluster
    own = cluster.machine_of(running_strand().host)
    return process.boot_id == own and not cluster.life(process.pid).alive


@contextmanager
def installed() -> Iterator[None]:
    """Inside, control processes, bootstrap and router run on the simulation."""
    replaced: dict[str, object] = {
        "bootstrap.client.dial": network.dial,
        "prefill_worker.control.dial": network.dial,
        "router.fleet.dial": network.dial,
        "bootstrap.server.accept": accept,
        "cluster.router_links.accept": accept,
        "decode_worker.control.accept": accept,
        "prefill_worker.control.run_until_stopped": run_until_stopped,
        "decode_worker.control.run_until_stopped": run_until_stopped,
        "cluster.worker_shell.EngineHost": _EngineHosts,
        "cluster.worker_shell.HttpServer": SimHttpServer,
        "cluster.worker_shell.WorkerMetrics": Silence,
        "cluster.worker_shell.MonotonicClock": running_loop,
        "cluster.access.security.ClusterSecurity.session": session,
        "cluster.process_identity.is_dead": _is_dead,
        "kv_transfer.opening.open_backend": lambda kv, agent, pool, host: _starting().open_backend(pool),
        "kv_transfer.opening.TransferThread": lambda *parts: _starting().start_transfers(*parts),
        "decode_worker.engine_process.HandoffReceiver": partial(HandoffReceiver, is_dead=_is_dead),
    }
    for role in ("prefill_worker", "decode_worker"):
        replaced |= {
            f"{role}.engine_process.Engine": lambda config, on_layer, rank: _starting().make_engine(config, on_layer),
            f"{role}.engine_process.current": lambda: _starting().identity,
        }
    with ExitStack() as stack:
        for name, stand_in in replaced.items():
            stack.enter_context(mock.patch(name, stand_in))
        yield

"""What operators and tools ask: models, health, metrics, the fleet, a request's record, this API's description."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from cluster.errors import Draining, ModelNotFound, NotFound
from cluster.metrics import CONTENT_TYPE, RouterMetrics, render
from router.api.admitting import Admission
from router.api.generation import GenerationApi
from router.api.openapi import document
from router.api.plan import Planner
from router.api.responses import FleetStatus, Health, ModelList, ModelObject
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.records import RecordStore


class OperationsApi:
    def __init__(
        self,
        router_id: str,
        started: int,
        unified: bool,
        planner: Planner,
        generation: GenerationApi,
        dispatcher: Dispatcher,
        fleet: Fleet,
        admission: Admission,
        records: RecordStore,
        metrics: RouterMetrics,
    ) -> None:
        """`started`: seconds since 1970."""
        self._router_id = router_id
        self._started = started
        self._unified = unified
        self._planner = planner
        self._generation = generation
        self._dispatcher = dispatcher
        self._fleet = fleet
        self._admission = admission
        self._records = records
        self._metrics = metrics
        self._has_been_ready = False

    async def health(self, request: web.Request) -> web.Response:
        """200 when a request could be served now. Raises `NoWorker` or `Draining`."""
        if self._generation.draining:
            raise Draining("this router is stopping")
        self._fleet.require()
        return _json(Health("ok"))

    async def ready(self, request: web.Request) -> web.Response:
        """200 when requests should come here: from when one could be served until this router drains. Not only while
        one could: requests wait here for workers on their way back, and elsewhere they would find no others. Raises
        `NoWorker` or `Draining`."""
        if self._has_been_ready and not self._generation.draining:
            return _json(Health("ok"))
        answer = await self.health(request)
        self._has_been_ready = True
        return answer

    async def live(self, request: web.Request) -> web.Response:
        """200 while this process answers at all."""
        return _json(Health("ok"))

    async def models(self, request: web.Request) -> web.Response:
        return _json(ModelList("list", [self._model()]))

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        if name != self._planner.served_model:
            raise ModelNotFound(f"there is no model {name!r} here", param="model")
        return _json(self._model())

    async def record(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        record = self._records.get(name)
        if record is None:
            raise NotFound(f"no recent request {name!r} is known here", param="id")
        return _json(record)

    async def status(self, request: web.Request) -> web.Response:
        return _json(
            FleetStatus(
                router=self._router_id,
                model=self._planner.served_model,
                unified=self._unified,
                draining=self._generation.draining,
                in_flight=self._dispatcher.in_flight,
                workers=self._fleet.statuses(),
                shut_out=self._dispatcher.shut_out,
                integrity_errors=[*self._fleet.integrity_errors(), *self._admission.integrity_errors()],
            )
        )

    async def metrics(self, request: web.Request) -> web.Response:
        self._dispatcher.observe()
        self._admission.observe()
        return web.Response(body=render(self._metrics.registry), headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: web.Request) -> web.Response:
        return _json(document(self._planner.served_model, self._planner.limits))

    def routes(self) -> list[tuple[str, Callable[[web.Request], Awaitable[web.Response]]]]:
        """All are GET."""
        return [
            ("/health", self.health),
            ("/ready", self.ready),
            ("/live", self.live),
            ("/v1/models", self.models),
            ("/v1/models/{model:.+}", self.model),
            ("/v1/requests/{id}", self.record),
            ("/status", self.status),
            ("/metrics", self.metrics),
            ("/openapi.json", self.openapi),
        ]

    def _model(self) -> ModelObject:
        limits = self._planner.limits
        return ModelObject(self._planner.served_model, "model", self._started, "baton", limits.context_length)


def _json(body: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")

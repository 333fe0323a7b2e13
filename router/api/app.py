"""The routes and what all of them share."""

from __future__ import annotations

from aiohttp import web

from cluster.access.keys import KeyRing
from cluster.config import Router
from cluster.metrics import RouterMetrics
from router.api.access import access_middleware
from router.api.errors import error_middleware
from router.api.generation import GenerationApi
from router.api.identity import identity_middleware, tell_identity
from router.api.operations import OperationsApi


def build_app(
    generation: GenerationApi, operations: OperationsApi, metrics: RouterMetrics, config: Router, keys: KeyRing | None
) -> web.Application:
    """The application; serve it with `handler_cancellation`, so that a client's disconnect cancels its handler."""
    middlewares = [identity_middleware, error_middleware(metrics)]
    if keys is not None:
        middlewares.append(access_middleware(keys, open_probes=config.open_probes))
    app = web.Application(client_max_size=config.max_body_bytes, middlewares=middlewares)
    app.on_response_prepare.append(tell_identity)
    app.router.add_post("/v1/chat/completions", generation.chat)
    app.router.add_post("/v1/completions", generation.completion)
    for path, handler in operations.routes():
        app.router.add_get(path, handler)
    return app

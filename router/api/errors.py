"""Errors become OpenAI error objects, with the status that the error's class knows."""

from __future__ import annotations

import msgspec
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from cluster.errors import (
    AvailabilityError,
    BatonError,
    BodyTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Unauthorized,
)
from cluster.logging import get_logger
from cluster.metrics import RouterMetrics
from router.api.identity import REQUEST_ID
from router.api.responses import ErrorBody, ErrorDetails

log = get_logger(__name__)


def error_body(error: BatonError) -> ErrorBody:
    return ErrorBody(ErrorDetails(error.message, error.openai_type, error.param, type(error).__name__))


def error_response(error: BatonError) -> web.Response:
    headers: dict[str, str] = {}
    if isinstance(error, AvailabilityError):
        headers[hdrs.RETRY_AFTER] = str(error.retry_after)
    elif isinstance(error, Unauthorized):
        headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
    body = msgspec.json.encode(error_body(error))
    return web.Response(body=body, status=error.status, headers=headers, content_type="application/json")


def error_middleware(metrics: RouterMetrics) -> Middleware:
    """Catches what a handler raises before its response has begun."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as refusal:
            error, headers = _of_http(request, refusal)
        except BatonError as known:
            error, headers = known, {}
        metrics.errors.labels(error=type(error).__name__).inc()
        # Probes ask for /health several times a second: only what someone wanted to be done is worth a line.
        tell = log.info if request.method == "POST" else log.debug
        tell("refused", request=request[REQUEST_ID], path=request.path, status=error.status, error=str(error))
        response = error_response(error)
        response.headers.update(headers)
        return response

    return middleware


def _of_http(request: web.Request, refusal: web.HTTPException) -> tuple[BatonError, dict[str, str]]:
    """aiohttp's own refusals, of which only the header of a 405 is kept."""
    if isinstance(refusal, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(refusal.allowed_methods))
        return MethodNotAllowed(f"{request.method} {request.path}: allowed is {allowed}"), {"Allow": allowed}
    if isinstance(refusal, web.HTTPRequestEntityTooLarge):
        return BodyTooLarge(f"the body is too large: {refusal.text}"), {}
    if isinstance(refusal, web.HTTPNotFound):
        return NotFound(f"there is no {request.path}"), {}
    return InvalidRequest(refusal.reason), {}

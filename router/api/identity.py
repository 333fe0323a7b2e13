"""A request's names. The client may give one (X-Request-Id); it is always told one, and the workers' logs carry it."""

from __future__ import annotations

import re
import secrets

from aiohttp import web
from aiohttp.typedefs import Handler

HEADER = "X-Request-Id"
REQUEST_ID = web.RequestKey("request_id", str)
"""The client's own id, made harmless, or a new one."""

_LONGEST = 64
_FORBIDDEN = re.compile(r"[^A-Za-z0-9._-]+")


def sanitised(given: str) -> str:
    """What of a client's id may go into logs, headers and messages; "" if nothing of it."""
    return _FORBIDDEN.sub("-", given)[:_LONGEST].strip("-")


@web.middleware
async def identity_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives every request its id."""
    request[REQUEST_ID] = sanitised(request.headers.get(HEADER, "")) or secrets.token_hex(16)
    return await handler(request)


async def tell_identity(request: web.Request, response: web.StreamResponse) -> None:
    """Every response says the request's id (a signal handler: it also sees streams)."""
    response.headers[HEADER] = request.get(REQUEST_ID, "")


def unique_id(prefix: str, request_id: str) -> str:
    """The id of the answer, and of the attempts behind it: never used before, even if a client repeats its own."""
    return f"{prefix}-{request_id}-{secrets.token_hex(4)}"

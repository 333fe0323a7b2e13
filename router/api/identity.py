"""A request's names. The client may give one (X-Request-Id); it is always told one, and the workers' logs carry it.

A request without a seed takes its seed from its name: whoever sends it again by that name, to whichever router, gets
the same tokens.
"""

from __future__ import annotations

import hashlib
import re
import secrets

from aiohttp import web
from aiohttp.typedefs import Handler

HEADER = "X-Request-Id"
REQUEST_ID = web.RequestKey("request_id", str)
"""The client's own id, made harmless, or a new one."""
NAMED = web.RequestKey("named", bool)
"""Whether it is the client's own."""

_LONGEST = 64
_FORBIDDEN = re.compile(r"[^A-Za-z0-9._-]+")


def sanitised(given: str) -> str:
    """What of a client's id may go into logs, headers and messages; "" if nothing of it."""
    return _FORBIDDEN.sub("-", given)[:_LONGEST].strip("-")


@web.middleware
async def identity_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives every request its id."""
    name = sanitised(request.headers.get(HEADER, ""))
    request[REQUEST_ID], request[NAMED] = name or secrets.token_hex(16), bool(name)
    return await handler(request)


async def tell_identity(request: web.Request, response: web.StreamResponse) -> None:
    """Every response says the request's id (a signal handler: it also sees streams)."""
    response.headers[HEADER] = request.get(REQUEST_ID, "")


def unique_id(prefix: str, request_id: str) -> str:
    """The id of the answer, and of the attempts behind it: never used before, even if a client repeats its own."""
    return f"{prefix}-{request_id}-{secrets.token_hex(4)}"


def seed_of(request_id: str) -> int:
    """63 bits that look random, always the same for one id."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") >> 1

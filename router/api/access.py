"""API keys: who may ask this router for anything."""

from __future__ import annotations

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from cluster.access.gate import PROBES
from cluster.access.keys import KeyRing
from cluster.errors import Unauthorized

_SCHEME = "bearer"


def access_middleware(keys: KeyRing, *, open_probes: bool) -> Middleware:
    """Refuses, before anything of the body is read, whoever shows none of `keys`. Raises `Unauthorized`."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not (open_probes and request.path in PROBES):
            _require_key(request.headers.get(hdrs.AUTHORIZATION), keys)
        return await handler(request)

    return middleware


def _require_key(authorization: str | None, keys: KeyRing) -> None:
    if authorization is None:
        raise Unauthorized("an API key is needed: send Authorization: Bearer KEY")
    scheme, _, shown = authorization.partition(" ")
    # aiohttp keeps bytes that are not UTF-8 as surrogates.
    if scheme.lower() != _SCHEME or not keys.accepts(shown.strip().encode(errors="surrogateescape")):
        raise Unauthorized("this is no API key of this cluster")

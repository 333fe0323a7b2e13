"""The proof of the cluster's secret on aiohttp: a middleware for servers and one for client sessions.

Everything that is not named as open is closed: a new endpoint is behind the gate without anybody thinking of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import aiohttp
from aiohttp import hdrs, web
from aiohttp.payload import Payload
from aiohttp.typedefs import Handler, Middleware

from cluster.access.keys import KeyRing
from cluster.access.proof import Examiner, Proof, Refusal, Subject, is_answer, prove
from cluster.clock import Clock
from cluster.logging import get_logger

log = get_logger(__name__)

PROBES = frozenset({"/health", "/ready", "/live", "/metrics", "/targets"})
"""What load balancers, Kubernetes and Prometheus ask; the last one of bootstrap."""

_ANSWER = web.RequestKey("cluster_proof", str)


class NotOfThisCluster(aiohttp.ClientConnectionError):
    """The other side does not accept our secret, or does not know it."""


def close_gate(
    app: web.Application,
    ring: KeyRing,
    open_paths: Collection[str],
    on_refused: Callable[[str], None],
    clock: Clock,
) -> None:
    """From now on `app` serves only who knows the secret, but for `open_paths`. `on_refused` counts, by reason."""
    app.middlewares.append(_server_side(ring, open_paths, on_refused, clock))
    app.on_response_prepare.append(_tell_answer)


def _server_side(
    ring: KeyRing, open_paths: Collection[str], on_refused: Callable[[str], None], clock: Clock
) -> Middleware:
    examiner = Examiner()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in open_paths:
            return await handler(request)
        authorization = request.headers.get(hdrs.AUTHORIZATION)
        try:
            # Who shows nothing is not even read.
            body = await request.read() if authorization and request.can_read_body else b""
            subject = Subject(request.method, request.path, body)
            request[_ANSWER] = examiner.examine(authorization, subject, ring.keys(), clock.now())
        except Refusal as refusal:
            on_refused(refusal.reason)
            if authorization is not None:  # The first step of any proof is to ask without one.
                log.warning("refused", remote=request.remote, path=request.path, reason=refusal.reason)
            challenge = {hdrs.WWW_AUTHENTICATE: examiner.challenge(clock.now())}
            body_of_refusal = {"error": {"code": "Unauthorized", "message": refusal.message}}
            return web.json_response(body_of_refusal, status=refusal.status, headers=challenge)
        return await handler(request)

    return middleware


async def _tell_answer(request: web.Request, response: web.StreamResponse) -> None:
    """A signal handler, as only it comes before the response of an upgrade, too."""
    answer = request.get(_ANSWER)
    if answer is not None:
        response.headers[hdrs.AUTHENTICATION_INFO] = answer


class ProvingMiddleware:
    """For a client session that speaks to workers and bootstrap only. Demands that these know the secret, too: one
    that does not ask for proof is no part of the cluster. Probes may be open."""

    def __init__(self, ring: KeyRing) -> None:
        self._ring = ring

    async def __call__(
        self, request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Raises `NotOfThisCluster`."""
        response = await handler(request)
        if request.url.path in PROBES and response.status != Refusal.status:
            return response
        body = await request.body.as_bytes() if isinstance(request.body, Payload) else request.body
        subject = Subject(request.method, request.url.path, body)
        proof = prove(response.headers.get(hdrs.WWW_AUTHENTICATE, ""), subject, self._ring.keys()[0])
        response.release()
        if proof is None:
            raise _refused(request, "it does not ask for proof of the cluster's secret: it has none, or is another")
        request.headers[hdrs.AUTHORIZATION] = proof.authorization
        response = await handler(request)
        self._require_answer(request, response, proof)
        return response

    @staticmethod
    def _require_answer(request: aiohttp.ClientRequest, response: aiohttp.ClientResponse, proof: Proof) -> None:
        if is_answer(response.headers.get(hdrs.AUTHENTICATION_INFO, ""), proof):
            return
        response.close()
        if response.status == Refusal.status:
            raise _refused(request, "it refuses our proof of the cluster's secret: is it the same on both sides?")
        raise _refused(request, "it does not prove that it knows the cluster's secret")


def _refused(request: aiohttp.ClientRequest, reason: str) -> NotOfThisCluster:
    log.warning("not of this cluster", url=str(request.url), reason=reason)
    return NotOfThisCluster(reason)

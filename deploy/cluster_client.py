"""What `baton` asks a cluster over HTTP: bootstrap for its workers, the router for health, answers and records."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp
import msgspec

from cluster.access.security import ClusterSecurity, router_session
from cluster.config import Bootstrap, Router, Security
from cluster.errors import LaunchError, NotFound
from cluster.messages import Member, MemberStatus
from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings

_ShapeT = TypeVar("_ShapeT")

_PROBE_SECONDS = 2.0


class Percentiles(msgspec.Struct, frozen=True):
    """None where there was but one token."""

    p50: float | None
    p99: float | None


class FirstToken(msgspec.Struct, frozen=True):
    """The parts of the time until the first token, see the router's own record; `tokenize` is a part of `router`."""

    router: float
    tokenize: float
    network: float
    queue: float
    prefill: float
    rest: float


class AttemptRecord(msgspec.Struct, frozen=True):
    """One attempt at a request, see the router's own record. Times are since the request's arrival, in seconds."""

    prefill_worker: str | None
    decode_worker: str | None
    placed_seconds: float
    ended_seconds: float | None
    tokens: int
    end: str | None
    error: str | None
    blame: str | None


class RequestRecord(msgspec.Struct, frozen=True):
    """Where one request's time went, by the router's `GET /v1/requests/{id}`, which has more fields. In seconds; None
    where there was no such leg, or where its end is still on the way."""

    id: str
    prompt_tokens: int
    output_tokens: int
    total_seconds: float | None = None
    queue_seconds: float | None = None
    prefill: PrefillTimings | None = None
    handoff: HandoffTimings | None = None
    decode: DecodeTimings | None = None
    first_token_seconds: float | None = None
    first_token: FirstToken | None = None
    second_token_seconds: float | None = None
    inter_token_seconds: Percentiles | None = None
    attempts: int = 1
    history: list[AttemptRecord] = []
    prefill_worker: str | None = None
    decode_worker: str | None = None
    finish_reason: str | None = None
    error: str | None = None
    blame: str | None = None


class Piece(msgspec.Struct, frozen=True):
    """A piece of an answer, and the id of its request."""

    request: str
    text: str


class _Workers(msgspec.Struct, frozen=True):
    workers: list[MemberStatus]


class _Placeable(msgspec.Struct, frozen=True):
    """A worker in the router's own view, which has more fields."""

    worker: str
    epoch: int
    live: bool


class _Fleet(msgspec.Struct, frozen=True):
    workers: list[_Placeable]


def base_url(host: str, port: int, scheme: str = "http") -> str:
    """The URL at which this machine reaches a server that listens on `host`, which may be all addresses."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


@asynccontextmanager
async def ask_bootstrap(
    config: Bootstrap, security: Security, url: str | None = None
) -> AsyncIterator[BootstrapClient]:
    """A client that knows the cluster's secret, at `url` or where `config` says. Raises `ConfigError`."""
    async with ClusterSecurity(security).session() as http:
        yield BootstrapClient(http, (url or base_url(config.host, config.port, security.tls.scheme)).rstrip("/"))


@asynccontextmanager
async def ask_router(config: Router, security: Security, url: str | None = None) -> AsyncIterator[RouterClient]:
    """A client with an API key, at `url` or where `config` says. Raises `ConfigError`."""
    async with router_session(config, security) as http:
        yield RouterClient(http, (url or base_url(config.host, config.port, config.tls.scheme)).rstrip("/"))


class BootstrapClient:
    """Asks a bootstrap service. `http` belongs to the caller."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url

    async def workers(self) -> list[MemberStatus]:
        """All live workers with their last heartbeat. Raises `LaunchError` if bootstrap can't be reached."""
        body = await _get(self._http, f"{self._url}/workers", "bootstrap")
        return _parse(body, _Workers, f"{self._url}/workers").workers

    async def drain(self, member: Member, *, restart: bool) -> None:
        """Asks one of these workers to end, with `restart` to be started anew. Returns at once. Raises `LaunchError` if
        it can't be reached."""
        url = f"{member.url}/drain"
        body = msgspec.json.encode({"restart": restart})
        _required(*await _ask(self._http, url, member.worker, body), url, member.worker)

    async def is_gone(self, member: Member) -> bool:
        """Whether one of these workers does not answer any more."""
        try:
            await _ask(self._http, f"{member.url}/live", member.worker)
        except LaunchError:
            return True
        return False


class RouterClient:
    """Asks a router. `http` belongs to the caller."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url

    async def check_health(self) -> None:
        """Raises `LaunchError` unless the router can serve now."""
        await _get(self._http, f"{self._url}/health", "the router")

    async def takes_work(self, worker: str, epoch: int) -> bool:
        """Whether this instance of a worker gets requests from this router. Raises `LaunchError`."""
        url = f"{self._url}/status"
        fleet = _parse(await _get(self._http, url, "the router"), _Fleet, url)
        return any(each.live and (each.worker, each.epoch) == (worker, epoch) for each in fleet.workers)

    async def record(self, request: str) -> RequestRecord:
        """Where the time of a request went, so far as the router knows; by the answer's id, or by the X-Request-Id that
        came with it. Raises `NotFound` for one that it does not know, `LaunchError` if it does not answer."""
        url = f"{self._url}/v1/requests/{quote(request, safe='')}"
        status, body = await _ask(self._http, url, "the router")
        if status == 404:
            raise NotFound(
                f"the router at {self._url} knows no recent request {request!r}: it keeps the last few thousand"
            )
        return _parse(_required(status, body, url, "the router"), RequestRecord, url)

    async def chat(self, model: str, prompt: str, max_tokens: int) -> AsyncIterator[Piece]:
        """The greedy answer to one user message, piece by piece as it arrives. Raises `LaunchError`."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        try:
            async with self._http.post(f"{self._url}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    raise LaunchError(f"the router answered {response.status}: {(await response.text())[:500]}")
                async for line in response.content:
                    piece = parse_event(line)
                    if piece is not None:
                        yield piece
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            raise LaunchError(f"the answer broke off: {_reason(error)}") from error


async def observe(bootstrap: BootstrapClient, router: RouterClient) -> tuple[list[MemberStatus] | None, bool]:
    """The roster (None: bootstrap does not answer), and whether the router can serve. Raises nothing."""

    async def roster() -> list[MemberStatus] | None:
        try:
            return await bootstrap.workers()
        except LaunchError:
            return None

    async def healthy() -> bool:
        try:
            await router.check_health()
        except LaunchError:
            return False
        return True

    return await asyncio.gather(roster(), healthy())


def parse_event(line: bytes) -> Piece | None:
    """What one line of the event stream adds to the answer, if anything. Raises `LaunchError` for an error in it."""
    kind, _, data = line.strip().partition(b": ")
    if kind != b"data" or data == b"[DONE]":
        return None
    try:
        chunk: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise LaunchError(f"the router's stream is not one of JSON chunks: {error}") from error
    if "error" in chunk:
        raise LaunchError(f"the router ended the answer: {chunk['error'].get('message')}")
    text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    return Piece(chunk["id"], text)


async def _get(http: aiohttp.ClientSession, url: str, who: str) -> bytes:
    return _required(*await _ask(http, url, who), url, who)


def _required(status: int, body: bytes, url: str, who: str) -> bytes:
    if not 200 <= status < 300:
        raise LaunchError(f"{who} at {url} answered {status}")
    return body


async def _ask(http: aiohttp.ClientSession, url: str, who: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of a GET, or with a `body` of a POST. Raises `LaunchError` if nobody answers."""
    method = "GET" if body is None else "POST"
    try:
        async with http.request(method, url, data=body, timeout=aiohttp.ClientTimeout(_PROBE_SECONDS)) as response:
            return response.status, await response.read()
    except (aiohttp.ClientError, asyncio.TimeoutError) as error:
        raise LaunchError(f"{who} at {url} does not answer: {_reason(error)}") from error


def _parse(body: bytes, shape: type[_ShapeT], url: str) -> _ShapeT:
    try:
        return msgspec.json.decode(body, type=shape)
    except msgspec.DecodeError as error:
        raise LaunchError(f"{url} answered something else than expected: {error}") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__

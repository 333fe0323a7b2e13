"""From a request's body to a typed request, with errors that name the field."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import msgspec
from aiohttp import web

from cluster.errors import BodyTimeout, InvalidRequest, UnsupportedMediaType
from router.api.requests import UNSUPPORTED_FIELDS, GenerationRequest

RequestT = TypeVar("RequestT", bound=GenerationRequest)

_PLACE = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`")


async def read_request(request: web.Request, kind: type[RequestT], seconds: float) -> RequestT:
    """`seconds` is how long the body may take to arrive. Raises `UnsupportedMediaType`, `InvalidRequest` or
    `BodyTimeout`; a body that is too large is aiohttp's to refuse."""
    if request.content_type != "application/json":
        raise UnsupportedMediaType(f"expected Content-Type application/json, found {request.content_type}")
    try:
        body = await asyncio.wait_for(request.read(), seconds)
    except asyncio.TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {seconds:g} s") from None
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(error) from error
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise InvalidRequest("the body is nested too deeply") from error


def _explained(error: msgspec.ValidationError) -> InvalidRequest:
    """`Expected ... - at $.messages[0].role` becomes a message that begins with the field."""
    text = str(error)
    place = _PLACE.search(text)
    path = place["path"] if place else ""
    problem = text[: place.start()] if place else text
    missing = _MISSING.match(text)
    if missing:
        field = f"{path}.{missing['field']}" if path else missing["field"]
        return InvalidRequest(f"{field}: a required field is missing", param=field)
    if re.split(r"[.\[]", path)[0] in UNSUPPORTED_FIELDS or path.endswith("tool_calls"):
        return InvalidRequest(f"{path}: this is not supported here ({_lowered(problem)})", param=path)
    return InvalidRequest(f"{path or 'the body'}: {_lowered(problem)}", param=path or None)


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]

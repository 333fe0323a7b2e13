"""The OpenAPI 3.1 document: schemas from the types of requests and responses, limits from the live workers."""

from __future__ import annotations

from typing import Any

import msgspec

from router.api.admitting import TIMEOUT_HEADER
from router.api.cursor import HEADER as LAST_EVENT_ID
from router.api.generation import RECOVERIES
from router.api.identity import HEADER
from router.api.requests import ChatCompletionRequest, CompletionRequest
from router.api.responses import (
    ChatChunk,
    ChatCompletion,
    Completion,
    ErrorBody,
    FleetStatus,
    Health,
    ModelList,
    ModelObject,
)
from router.fleet_view import FleetLimits
from router.records import RequestRecord

_TYPES = (
    ChatCompletionRequest,
    CompletionRequest,
    ChatCompletion,
    ChatChunk,
    Completion,
    ErrorBody,
    FleetStatus,
    Health,
    ModelList,
    ModelObject,
    RequestRecord,
)
_ERRORS = {
    400: "The request is malformed, out of range, or does not fit the context or the KV pool",
    401: "An API key is needed, and none or a wrong one was shown",
    404: "There is no such model, request or URL",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is not application/json",
    429: "A bounded queue is full",
    500: "A defect",
    503: "No worker can serve the request now",
}
_RETRYABLE = (429, 503)

Schema = dict[str, Any]

_TOKEN_ID = {"$ref": "#/components/schemas/TokenId"}
_PROMPT: Schema = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "items": _TOKEN_ID},
        {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": _TOKEN_ID}},
    ]
}


def document(served_model: str, limits: FleetLimits) -> Schema:
    """The description of this API as it is served now."""
    _, components = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    most = {"anyOf": [{"type": "integer", "minimum": 1, "maximum": limits.context_length - 1}, {"type": "null"}]}
    components[ChatCompletionRequest.__name__]["properties"]["max_completion_tokens"] = most
    components["TokenId"] = {"type": "integer", "minimum": 0, "maximum": limits.vocab_size - 1}
    for name in (ChatCompletionRequest.__name__, CompletionRequest.__name__):
        components[name]["properties"]["max_tokens"] = most
        components[name]["properties"]["model"] = {"type": "string", "enum": [served_model]}
    components[CompletionRequest.__name__]["properties"]["prompt"] = _PROMPT
    return {
        "openapi": "3.1.0",
        "info": {"title": "Baton", "version": "1", "description": "OpenAI-compatible LLM serving, disaggregated."},
        "paths": {
            "/v1/chat/completions": {"post": _generating("chat", ChatCompletionRequest, ChatCompletion, ChatChunk)},
            "/v1/completions": {"post": _generating("completion", CompletionRequest, Completion, Completion)},
            "/v1/models": {"get": _reading("models", ModelList)},
            "/v1/models/{model}": {"get": _reading("model", ModelObject, "model")},
            "/v1/requests/{id}": {"get": _reading("record", RequestRecord, "id")},
            "/health": {"get": _reading("health", Health, errors=(503,))},
            "/ready": {"get": _reading("ready", Health, errors=(503,))},
            "/live": {"get": _reading("live", Health)},
            "/status": {"get": _reading("status", FleetStatus)},
            "/metrics": {"get": _metrics()},
            "/openapi.json": {"get": _operation("openapi", {"200": _response("This document", {"type": "object"})})},
        },
        "components": {"schemas": components},
    }


def _generating(name: str, body: type, answer: type, chunk: type) -> Schema:
    """An endpoint that answers as a whole or as a stream. OpenAPI 3.1 has no schema for events: words must do."""
    events = f"with `stream` true, server-sent events whose data is a `{chunk.__name__}` each, the last one `[DONE]`"
    answers = _response(f"The answer; {events}", _ref(answer))
    answers["content"]["text/event-stream"] = {}
    operation = _operation(name, {"200": answers, **_errors(400, 401, 404, 408, 413, 415, 429, 500, 503)})
    answers["headers"][RECOVERIES] = {
        "description": "How often the answer went on on other workers, where it did",
        "schema": {"type": "integer"},
    }
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    operation["description"] = (
        f"The header {TIMEOUT_HEADER} gives the seconds that the request may take, if these are fewer than the "
        "server's own limit: a request that would have to wait longer is answered 429 at once."
    )
    operation["parameters"] = [
        {
            "name": HEADER,
            "in": "header",
            "required": False,
            "description": "The client's own id for the request: it is in the logs of all processes, gives the seed "
            "where the request has none, and gives ids to a stream's events",
            "schema": {"type": "string"},
        },
        {
            "name": LAST_EVENT_ID,
            "in": "header",
            "required": False,
            "description": "For a client that lost its connection and sends the same request again, with its "
            f"{HEADER}: the id of the last event that it got. The stream goes on after that",
            "schema": {"type": "string"},
        },
    ]
    return operation


def _reading(name: str, answer: type, parameter: str | None = None, errors: tuple[int, ...] = ()) -> Schema:
    wanted = (401, *errors, 404) if parameter else (401, *errors)
    operation = _operation(name, {"200": _response("The answer", _ref(answer)), **_errors(*wanted)})
    if parameter:
        operation["parameters"] = [
            {"name": parameter, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        ]
    return operation


def _metrics() -> Schema:
    text = {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return _operation("metrics", {"200": text})


def _operation(name: str, responses: Schema) -> Schema:
    return {"operationId": name, "responses": responses}


def _response(description: str, schema: Schema) -> Schema:
    headers = {HEADER: {"description": "The request's id", "schema": {"type": "string"}}}
    return {"description": description, "headers": headers, "content": {"application/json": {"schema": schema}}}


def _errors(*statuses: int) -> Schema:
    errors = {str(status): _response(_ERRORS[status], _ref(ErrorBody)) for status in statuses}
    for status in _RETRYABLE:
        if str(status) in errors:
            retry = {"description": "Seconds to wait", "required": True, "schema": {"type": "integer"}}
            errors[str(status)]["headers"]["Retry-After"] = retry
    return errors


def _ref(kind: type) -> Schema:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}

"""What clients may send: OpenAI's request bodies, as types. Decoding checks their limits, /openapi.json shows them.

Unknown fields are ignored, as clients of many servers expect. Fields that would change the meaning of the answer and
that we don't implement are here too, with the only values that mean nothing (`UNSUPPORTED_FIELDS`): anything else is
refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import Meta

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenCount = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
StopString = Annotated[str, Meta(min_length=1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_PRIORITY = Meta(
    ge=-100,
    le=100,
    description="The higher, the more urgent; 0 by default. It counts where the cluster schedules by priority.",
)
NoArray = Annotated[list[Any], Meta(max_length=0)]
Prompt = Union[str, list[Union[str, int, list[int]]]]
"""Lists are of one kind throughout, which the type can't tell: the planner checks it, /openapi.json shows it."""


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An object without a field."""


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    type: Literal["text"]


class TextPart(msgspec.Struct, frozen=True):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: NoArray | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints understand. None means the default, as if the field were not there."""

    model: str
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Int64 | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=64)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: Annotated[int, _PRIORITY] | None = None

    logit_bias: Nothing | None = None
    response_format: ResponseFormat | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=1, le=1)] | None = None


class ChatCompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

    tools: NoArray | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: NoArray | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """POST /v1/completions"""

    prompt: Prompt
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None

    echo: Literal[False] | None = None
    best_of: Annotated[int, Meta(ge=1, le=1)] | None = None
    suffix: Annotated[str, Meta(max_length=0)] | None = None


UNSUPPORTED_FIELDS = frozenset(
    {
        "logit_bias",
        "response_format",
        "min_tokens",
        "repetition_penalty",
        "tools",
        "tool_calls",
        "tool_choice",
        "functions",
        "function_call",
        "modalities",
        "audio",
        "prediction",
        "web_search_options",
        "echo",
        "best_of",
        "suffix",
    }
)
"""Refused by name when they ask for something."""

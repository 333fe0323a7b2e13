"""How outputs look to a client: one class for chat, one for completions, with the same methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from router.api.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from router.text.output import Delta, TokenInfo

FinishText = Literal["stop", "length"]


class Heading(NamedTuple):
    """What every chunk of an answer repeats."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    logprobs: bool
    token_ids: bool
    usage: bool
    """Chunks have `usage`, null until the last."""


class Answer(NamedTuple):
    """A whole choice."""

    delta: Delta
    finish: FinishText
    prompt: list[int]


class Format(Protocol):
    """One request's format; makes bodies, keeps nothing."""

    prefix: str
    """Of the answer's id."""
    continues_prompt: bool

    def opening(self, heading: Heading, index: int) -> msgspec.Struct | None:
        """The chunk that begins a choice, if there is one."""

    def chunk(self, heading: Heading, index: int, delta: Delta, finish: FinishText | None) -> msgspec.Struct:
        """What is new in a choice."""

    def usage_chunk(self, heading: Heading, usage: Usage) -> msgspec.Struct:
        """The last chunk, if the client asked for it."""

    def whole(self, heading: Heading, answers: Sequence[Answer], usage: Usage) -> msgspec.Struct:
        """The body of an answer that is not streamed."""


class ChatFormat:
    prefix = "chatcmpl"
    continues_prompt = False

    def opening(self, heading: Heading, index: int) -> ChatChunk:
        choice = ChatChunkChoice(index, ChatDelta(role="assistant", content=""), None, None)
        return self._chunk(heading, [choice], _no_usage(heading))

    def chunk(self, heading: Heading, index: int, delta: Delta, finish: FinishText | None) -> ChatChunk:
        content = ChatDelta(content=delta.text) if delta.text or finish is None else ChatDelta()
        logprobs = _chat_logprobs(delta.infos) if heading.logprobs and delta.infos else None
        choice = ChatChunkChoice(index, content, logprobs, finish, _token_ids(heading, delta))
        return self._chunk(heading, [choice], _no_usage(heading))

    def usage_chunk(self, heading: Heading, usage: Usage) -> ChatChunk:
        return self._chunk(heading, [], usage)

    def whole(self, heading: Heading, answers: Sequence[Answer], usage: Usage) -> ChatCompletion:
        choices = [
            ChatChoice(
                index,
                AssistantMessage("assistant", answer.delta.text),
                _chat_logprobs(answer.delta.infos) if heading.logprobs else None,
                answer.finish,
                _token_ids(heading, answer.delta),
                answer.prompt if heading.token_ids else UNSET,
            )
            for index, answer in enumerate(answers)
        ]
        return ChatCompletion(heading.id, "chat.completion", heading.created, heading.model, choices, usage)

    @staticmethod
    def _chunk(heading: Heading, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(heading.id, "chat.completion.chunk", heading.created, heading.model, choices, usage)


class CompletionFormat:
    prefix = "cmpl"
    continues_prompt = True

    def opening(self, heading: Heading, index: int) -> None:
        return None

    def chunk(self, heading: Heading, index: int, delta: Delta, finish: FinishText | None) -> Completion:
        choice = CompletionChoice(index, delta.text, _legacy(heading, delta), finish, _token_ids(heading, delta))
        return self._completion(heading, [choice], _no_usage(heading))

    def usage_chunk(self, heading: Heading, usage: Usage) -> Completion:
        return self._completion(heading, [], usage)

    def whole(self, heading: Heading, answers: Sequence[Answer], usage: Usage) -> Completion:
        choices = [
            CompletionChoice(
                index,
                answer.delta.text,
                _legacy(heading, answer.delta),
                answer.finish,
                _token_ids(heading, answer.delta),
                answer.prompt if heading.token_ids else UNSET,
            )
            for index, answer in enumerate(answers)
        ]
        return self._completion(heading, choices, usage)

    @staticmethod
    def _completion(heading: Heading, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(heading.id, "text_completion", heading.created, heading.model, choices, usage)


def _no_usage(heading: Heading) -> UnsetType | None:
    return None if heading.usage else UNSET


def _token_ids(heading: Heading, delta: Delta) -> list[int] | UnsetType:
    return delta.token_ids if heading.token_ids else UNSET


def _chat_logprobs(infos: Sequence[TokenInfo]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            TokenLogprob(
                token=_text(info.data),
                logprob=info.logprob,
                bytes=list(info.data),
                top_logprobs=[TopLogprob(_text(data), logprob, list(data)) for _, data, logprob in info.top],
            )
            for info in infos
        ]
    )


def _legacy(heading: Heading, delta: Delta) -> CompletionLogprobs | None:
    """The older form: parallel lists; alternatives by their text, the chosen token always among them."""
    if not heading.logprobs:
        return None
    infos = delta.infos
    return CompletionLogprobs(
        tokens=[_escaped(info.data) for info in infos],
        token_logprobs=[info.logprob for info in infos],
        top_logprobs=[
            {_escaped(data): logprob for _, data, logprob in info.top} | {_escaped(info.data): info.logprob}
            for info in infos
        ],
        text_offset=[info.text_offset for info in infos],
    )


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _escaped(data: bytes) -> str:
    r"""OpenAI's form for a token that is only a part of a character: `bytes:\xe2\x82`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

"""What a client has got of a request, and how it differs from what it should have got."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

LOGPROB_TOLERANCE = 1e-3
SHOWN_TOKENS = 6


class Verdict(str, Enum):
    """The ways for a request to go wrong."""

    FAILED = "failed"
    """It ended with an error, or did not end."""
    LOST = "lost"
    """Tokens are missing."""
    DUPLICATED = "duplicated"
    """Tokens came more than once."""
    DIFFERENT = "different"
    """Anything else that is not as it should be: tokens, text, probabilities, finish reason or usage."""


@dataclass
class ChoiceAnswer:
    """One choice, put together from its chunks."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the chosen tokens and their alternatives, in the order in which they came."""
    finish: str | None = None

    def add(self, choice: dict[str, Any]) -> int:
        """Takes in a chunk's choice; returns its number of tokens."""
        tokens = choice.get("token_ids") or []
        self.text += choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        self.tokens += tokens
        self.logprobs += _logprobs(choice.get("logprobs") or {})
        self.finish = choice["finish_reason"] or self.finish
        return len(tokens)


@dataclass
class Answer:
    """All choices of a request."""

    choices: list[ChoiceAnswer]
    usage: tuple[int, int] | None = None
    """Prompt and completion tokens, as the server counts them."""

    @property
    def tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)

    def add(self, chunk: dict[str, Any]) -> list[tuple[int, int]]:
        """Takes in one event's data; returns the tokens that came, as (choice, how many)."""
        if chunk.get("usage"):
            self.usage = chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]
        found = [(choice["index"], self.choices[choice["index"]].add(choice)) for choice in chunk["choices"]]
        return [(index, count) for index, count in found if count]


def judge(got: Answer, expected: Answer) -> tuple[Verdict, str] | None:
    """What is wrong with `got`, and where; None if nothing is."""
    for index, (ours, theirs) in enumerate(zip(got.choices, expected.choices, strict=True)):
        found = _judge_choice(ours, theirs)
        if found is not None:
            return found[0], f"choice {index}: {found[1]}"
    if got.usage != expected.usage:
        return Verdict.DIFFERENT, f"usage is {got.usage} instead of {expected.usage}"
    return None


def _judge_choice(got: ChoiceAnswer, expected: ChoiceAnswer) -> tuple[Verdict, str] | None:
    if got.tokens != expected.tokens:
        return _kind_of_difference(got.tokens, expected.tokens), _first_difference(got.tokens, expected.tokens)
    if got.text != expected.text:
        return Verdict.DIFFERENT, f"text is {got.text!r} instead of {expected.text!r}"
    if got.finish != expected.finish:
        return Verdict.DIFFERENT, f"it finished with {got.finish!r} instead of {expected.finish!r}"
    if len(got.logprobs) != len(expected.logprobs):
        return Verdict.DIFFERENT, f"{len(got.logprobs)} probabilities instead of {len(expected.logprobs)}"
    drift = max((abs(ours - theirs) for ours, theirs in zip(got.logprobs, expected.logprobs, strict=True)), default=0.0)
    if drift > LOGPROB_TOLERANCE:
        return Verdict.DIFFERENT, f"a probability is off by {drift:g}"
    return None


def _kind_of_difference(got: Sequence[int], expected: Sequence[int]) -> Verdict:
    if _is_part(got, expected):
        return Verdict.LOST
    return Verdict.DUPLICATED if _is_part(expected, got) else Verdict.DIFFERENT


def _is_part(part: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether `part` is `whole` with some elements left out."""
    rest = iter(whole)
    return all(token in rest for token in part)


def _first_difference(got: Sequence[int], expected: Sequence[int]) -> str:
    pairs = enumerate(zip(got, expected, strict=False))
    place = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(got), len(expected)))
    end = place + SHOWN_TOKENS
    return (
        f"tokens differ from number {place} on: {list(got[place:end])} instead of {list(expected[place:end])} "
        f"({len(got)} instead of {len(expected)} in all)"
    )


def _logprobs(logprobs: dict[str, Any]) -> list[float]:
    if "content" in logprobs:
        entries = logprobs["content"]
        return [
            value
            for entry in entries
            for value in (entry["logprob"], *(top["logprob"] for top in entry["top_logprobs"]))
        ]
    found: list[float] = []
    for chosen, top in zip(logprobs.get("token_logprobs", []), logprobs.get("top_logprobs", []), strict=True):
        found += [chosen, *sorted(top.values(), reverse=True)]
    return found

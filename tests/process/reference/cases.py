"""The cases of `reference.json`: prompts of the demo model and what transformers' greedy `generate` answers in float32.

Token ids are kept, not texts, so that a case means the same whatever a tokenizer does; chat cases keep their messages
too, which the router has to turn into the same ids.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

PATH = Path(__file__).with_name("reference.json")
SMALLEST_GAP = 1e-3
"""A case whose two best logits are ever closer than this decides nothing: rounding would. Such cases are not kept."""


class ChatMessage(msgspec.Struct, frozen=True):
    role: str
    content: str


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt. `logprobs[i]` belongs to `expected[i]`; `gap` is the smallest distance of the two best logits."""

    name: str
    prompt: list[int]
    messages: list[ChatMessage] | None = None
    new_tokens: int
    expected: list[int]
    logprobs: list[float]
    gap: float


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """All cases and what made them."""

    model: str
    dtype: str
    torch: str
    transformers: str
    smallest_gap: float
    cases: list[Case]

    def named(self, name: str) -> Case:
        return next(case for case in self.cases if case.name == name)


def load_reference() -> Reference:
    """The fixture as committed."""
    return msgspec.json.decode(PATH.read_bytes(), type=Reference)


def write_reference(reference: Reference) -> None:
    """One case a line: a change of one case is a diff of one line."""
    head = msgspec.to_builtins(reference) | {"cases": []}
    lines = ",\n".join(msgspec.json.encode(case).decode() for case in reference.cases)
    text = msgspec.json.encode(head).decode().removesuffix("[]}") + "[\n" + lines + "\n]}\n"
    PATH.write_text(text)

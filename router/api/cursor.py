"""Where a stream stands: the `id` of its events, and the `Last-Event-ID` of a client that comes back for the rest.

A cursor has a mark for each choice, in order, with dots between them, and `+` after them once the usage was told:

    12          one choice, of which 12 tokens were told
    12.0.-      three: of the second only the opening was told, of the third nothing
    12f.7f+     both are told to their finish reason, and the usage too; what is left is [DONE]

It counts tokens and not events: another router, or another time, cuts the same stream into other events.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from cluster.errors import InvalidRequest

HEADER = "Last-Event-ID"
_MARK = re.compile(r"-|(?P<tokens>[0-9]{1,10})(?P<finished>f?)")
_EXPECTED = "expected the id of the last event that was received"


class Mark(NamedTuple):
    """How far one choice was told."""

    begun: bool = False
    tokens: int = 0
    finished: bool = False

    def __str__(self) -> str:
        return f"{self.tokens}{'f' * self.finished}" if self.begun else "-"


class Cursor:
    """One stream's place. `marks` are by choice."""

    def __init__(self, choices: int) -> None:
        self.marks = [Mark()] * choices
        self.usage_told = False

    @classmethod
    def parse(cls, text: str, limits: Sequence[int]) -> Cursor:
        """`limits`: the most tokens of each choice. Raises `InvalidRequest`, saying what was expected."""
        cursor = cls(len(limits))
        cursor.usage_told = text.endswith("+")
        marks = text.removesuffix("+").split(".")
        if len(marks) != len(limits):
            raise _refused(text, f"{_EXPECTED}, with {len(limits)} marks for as many choices; found {len(marks)}")
        cursor.marks = [_mark(text, mark, limit) for mark, limit in zip(marks, limits, strict=True)]
        if cursor.usage_told and not all(mark.finished for mark in cursor.marks):
            raise _refused(text, "the usage (+) comes after the last choice's finish reason (f)")
        return cursor

    def tell(self, choice: int, tokens: int, *, finished: bool) -> None:
        self.marks[choice] = Mark(True, tokens, finished)

    def __str__(self) -> str:
        return ".".join(str(mark) for mark in self.marks) + "+" * self.usage_told


def _mark(text: str, mark: str, limit: int) -> Mark:
    found = _MARK.fullmatch(mark)
    if found is None:
        raise _refused(text, f"{_EXPECTED}, such as 12 or 12f; found {mark!r}")
    tokens = int(found["tokens"] or 0)
    if tokens > limit:
        raise _refused(text, f"it names token {tokens} of a choice that has {limit} at most")
    return Mark(mark != "-", tokens, bool(found["finished"]))


def _refused(text: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{HEADER} {text[:64]!r}: {problem}", param=HEADER)

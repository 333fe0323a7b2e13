"""What a PromQL expression asks for: metrics with the labels that they are chosen and grouped by. No more of a parser
than that takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

TOKEN = re.compile(
    r"""(?P<space>\s+)
      | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<range>\[[^\]]*\])
      | (?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
      | (?P<number>[0-9.]+[a-z]*)
      | (?P<operator>=~|!~|!=|==|<=|>=|[-+*/%^=<>(){},])""",
    re.VERBOSE,
)
GROUPING = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})
WORDS = frozenset({"and", "or", "unless", "offset", "bool", "inf", "nan"})


class Asked(NamedTuple):
    """`selectors` are (metric, names of the labels that it is chosen by); `groups` the labels of all groupings."""

    selectors: list[tuple[str, frozenset[str]]]
    groups: frozenset[str]


def tokens(expression: str) -> Iterator[tuple[str, str]]:
    """(kind, text). Raises `ValueError` for what is none."""
    place = 0
    while place < len(expression):
        found = TOKEN.match(expression, place)
        if found is None:
            raise ValueError(f"not PromQL from here on: {expression[place : place + 20]!r}")
        place = found.end()
        if found.lastgroup != "space":
            yield str(found.lastgroup), found.group()


def asked(expression: str) -> Asked:
    found = [*tokens(expression), ("end", "")]
    selectors: list[tuple[str, frozenset[str]]] = []
    groups: set[str] = set()
    place = 0
    while found[place][0] != "end":
        kind, text = found[place]
        after = found[place + 1][1]
        place += 1
        if kind != "name" or text.lower() in WORDS:
            continue
        if text in GROUPING:
            names, place = _names(found, place, ")")
            groups |= names
        elif after == "{":
            names, place = _names(found, place, "}")
            selectors.append((text, frozenset(names)))
        elif after not in {"(", "by", "without"}:  # else a function, or an aggregation
            selectors.append((text, frozenset()))
    return Asked(selectors, frozenset(groups))


def _names(found: list[tuple[str, str]], place: int, end: str) -> tuple[set[str], int]:
    """All names until `end`, and the place behind it."""
    names = set()
    while found[place][1] != end:
        kind, text = found[place]
        if kind == "end":
            raise ValueError(f"{end} is missing")
        if kind == "name":
            names.add(text)
        place += 1
    return names, place + 1

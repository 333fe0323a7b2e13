"""From a template's text to a tree: text, actions, blocks. After the documentation of Go's text/template. Pure."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, Union

from cluster.errors import ConfigError


class Place(NamedTuple):
    """Where something stands in the chart."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class TemplateError(ConfigError):
    """A template that can't be rendered, by its own `fail` or because it is wrong. It begins with the place."""


# --- values ----------------------------------------------------------------------------------------------------------


class Literal(NamedTuple):
    value: Any


class Variable(NamedTuple):
    """`$name`; `$` itself, what the template was called with, is ""."""

    name: str


class Dot(NamedTuple):
    """What is being looked at: changed by `range` and `with`."""


class Call(NamedTuple):
    """A function and its arguments; alone in a pipeline's command, a value is its own call."""

    function: str
    arguments: tuple[Value, ...]


class Pipeline(NamedTuple):
    """Each command's result is the last argument of the next one."""

    commands: tuple[Value, ...]


class Field(NamedTuple):
    """`of.name`."""

    of: Value
    name: str


Value = Union[Literal, Variable, Dot, Call, Pipeline, Field]

# --- nodes -----------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    text: str


class Show(NamedTuple):
    """`{{ value }}`."""

    place: Place
    value: Value


class Assign(NamedTuple):
    """`{{ $name := value }}`, or with = instead of :=, to a variable of an outer block."""

    place: Place
    name: str
    value: Value
    declares: bool


class If(NamedTuple):
    place: Place
    condition: Value
    then: tuple[Node, ...]
    otherwise: tuple[Node, ...]


class With(NamedTuple):
    """As `If`, with the value as the dot, and as `name` where one is given."""

    place: Place
    name: str | None
    value: Value
    then: tuple[Node, ...]
    otherwise: tuple[Node, ...]


class Range(NamedTuple):
    """Over a list, or a mapping in the order of its keys; `key` and `item` are variables, if given."""

    place: Place
    key: str | None
    item: str | None
    value: Value
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...]


Node = Union[Text, Show, Assign, If, With, Range]


class Template(NamedTuple):
    """A file's own nodes, and the named templates that it defines."""

    nodes: tuple[Node, ...]
    defined: dict[str, tuple[Node, ...]]


def parse(text: str, file: str) -> Template:
    """Raises `TemplateError` with file and line."""
    return _Parser(_split(text, file)).template()


# --- text and actions ------------------------------------------------------------------------------------------------

_ACTION = re.compile(
    r"\{\{(?P<left>- )?(?P<body>/\*.*?\*/|(?:\"(?:\\.|[^\"\\])*\"|`[^`]*`|[^\"`])*?)(?P<right> -)?\}\}", re.DOTALL
)
_TOKEN = re.compile(
    r"""\s*(?:
        (?P<string>"(?:\\.|[^"\\])*"|`[^`]*`)
      | (?P<number>-?\d+(?:\.\d+)?)
      | (?P<variable>\$\w*)
      | (?P<field>\.\w+)
      | (?P<word>[A-Za-z_]\w*)
      | (?P<sign>:=|[=|().,])
    )""",
    re.VERBOSE,
)


class _Token(NamedTuple):
    kind: str
    text: str
    spaced: bool
    """Whether blank space stands before it: `.a.b` is one value, `.a .b` are two."""


class _Action(NamedTuple):
    place: Place
    tokens: tuple[_Token, ...]


def _split(text: str, file: str) -> Iterator[Text | _Action]:
    """Text and actions in turn; comments are left out, and so is the blank space that dashes ask to be."""
    start, trims = 0, False
    for found in _ACTION.finditer(text):
        before = text[start : found.start()]
        before = before.lstrip() if trims else before
        if found["left"]:
            before = before.rstrip()
        if before:
            yield Text(before)
        start, trims = found.end(), bool(found["right"])
        body = found["body"].strip()
        if not body.startswith("/*"):
            place = Place(file, text.count("\n", 0, found.start()) + 1)
            yield _Action(place, tuple(_tokens(body, place)))
    rest = text[start:]
    if "{{" in rest:
        line = text.count("\n", 0, start + rest.index("{{")) + 1
        raise TemplateError(f"{Place(file, line)}: an action that does not end")
    yield Text(rest.lstrip() if trims else rest)


def _tokens(body: str, place: Place) -> Iterator[_Token]:
    position = 0
    while position < len(body):
        found = _TOKEN.match(body, position)
        if found is None or found.lastgroup is None:
            raise TemplateError(f"{place}: not understood: {body[position:].strip()}")
        text = found[found.lastgroup]
        yield _Token(found.lastgroup, text, found.start(found.lastgroup) > position)
        position = found.end()


# --- the tree --------------------------------------------------------------------------------------------------------

_BLOCKS = frozenset({"if", "with", "range", "define"})
_WORDS = {"true": True, "false": False, "nil": None}


class _Parser:
    """Recursive descent over the actions, and within one over its tokens."""

    def __init__(self, items: Iterator[Text | _Action]) -> None:
        self._items = items
        self._defined: dict[str, tuple[Node, ...]] = {}

    def template(self) -> Template:
        nodes, ended = self._nodes()
        if ended is not None:
            raise TemplateError(f"{ended.place}: {ended.tokens[0].text} without a block")
        return Template(nodes, self._defined)

    def _nodes(self) -> tuple[tuple[Node, ...], _Action | None]:
        """Up to the `end` or `else` that closes them, which is returned too; None at the end of the file."""
        nodes: list[Node] = []
        for item in self._items:
            if isinstance(item, Text):
                nodes.append(item)
                continue
            first = item.tokens[0].text if item.tokens else ""
            if first in ("end", "else"):
                return tuple(nodes), item
            if first in _BLOCKS:
                nodes += self._block(item.place, first, list(item.tokens[1:]))
            elif item.tokens:
                nodes.append(_statement(item))
        return tuple(nodes), None

    def _block(self, place: Place, word: str, header: list[_Token]) -> list[Node]:
        if word == "define":
            body, _ = self._body(place, word)
            self._defined[str(ast.literal_eval(header[0].text))] = body
            return []
        names = _names(header)
        value = _value(header, place)
        then, otherwise = self._body(place, word)
        if word == "if":
            return [If(place, value, then, otherwise)]
        if word == "with":
            return [With(place, names[0] if names else None, value, then, otherwise)]
        key, item = names if len(names) == 2 else (None, names[0] if names else None)
        return [Range(place, key, item, value, then, otherwise)]

    def _body(self, place: Place, word: str) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
        """A block's nodes, and those of its `else`; `else if` is a block in an `else`, with the same end."""
        then, end = self._nodes()
        if end is None:
            raise TemplateError(f"{place}: {word} without end")
        if end.tokens[0].text == "end":
            return then, ()
        if len(end.tokens) > 1:
            return then, tuple(self._block(end.place, end.tokens[1].text, list(end.tokens[2:])))
        otherwise, end = self._nodes()
        if end is None or end.tokens[0].text != "end":
            raise TemplateError(f"{place}: {word} without end after its else")
        return then, otherwise


def _statement(action: _Action) -> Node:
    tokens = list(action.tokens)
    if len(tokens) > 1 and tokens[0].kind == "variable" and tokens[1].text in (":=", "="):
        value = _value(tokens[2:], action.place)
        return Assign(action.place, tokens[0].text[1:], value, tokens[1].text == ":=")
    return Show(action.place, _value(tokens, action.place))


def _names(header: list[_Token]) -> list[str]:
    """Takes `$name :=` or `$key, $item :=` off the beginning."""
    signs = [token.text for token in header]
    if ":=" not in signs:
        return []
    count = signs.index(":=")
    names = [token.text[1:] for token in header[:count] if token.kind == "variable"]
    del header[: count + 1]
    return names


def _value(tokens: list[_Token], place: Place) -> Value:
    """All of `tokens` as one pipeline."""
    rest = list(tokens)
    value = _pipeline(rest, place)
    if rest:
        raise TemplateError(f"{place}: not understood: {rest[0].text}")
    return value


def _pipeline(tokens: list[_Token], place: Place) -> Value:
    commands = [_command(tokens, place)]
    while tokens and tokens[0].text == "|":
        tokens.pop(0)
        commands.append(_command(tokens, place))
    return commands[0] if len(commands) == 1 else Pipeline(tuple(commands))


def _command(tokens: list[_Token], place: Place) -> Value:
    if tokens and tokens[0].kind == "word" and tokens[0].text not in _WORDS:
        name = tokens.pop(0).text
        arguments = []
        while tokens and tokens[0].text not in ("|", ")"):
            arguments.append(_operand(tokens, place))
        return Call(name, tuple(arguments))
    return _operand(tokens, place)


def _operand(tokens: list[_Token], place: Place) -> Value:
    if not tokens:
        raise TemplateError(f"{place}: a value is missing")
    token = tokens.pop(0)
    value = _simple(token, tokens, place)
    while tokens and tokens[0].kind == "field" and not tokens[0].spaced:
        value = Field(value, tokens.pop(0).text[1:])
    return value


def _simple(token: _Token, tokens: list[_Token], place: Place) -> Value:
    if token.kind == "string":
        return Literal(token.text[1:-1] if token.text[0] == "`" else str(ast.literal_eval(token.text)))
    if token.kind == "number":
        return Literal(float(token.text) if "." in token.text else int(token.text))
    if token.kind == "variable":
        return Variable(token.text[1:])
    if token.kind == "field":
        return Field(Dot(), token.text[1:])
    if token.text == ".":
        return Dot()
    if token.text in _WORDS:
        return Literal(_WORDS[token.text])
    if token.kind == "word":
        return Call(token.text, ())
    if token.text == "(":
        value = _pipeline(tokens, place)
        if not tokens or tokens.pop(0).text != ")":
            raise TemplateError(f"{place}: a parenthesis that does not end")
        return value
    raise TemplateError(f"{place}: not understood: {token.text}")

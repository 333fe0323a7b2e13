"""Renders template trees to text. After the documentation of Go's text/template and of Helm. Pure but for what
the functions do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from deploy.kubernetes.templating.functions import FUNCTIONS, text_of
from deploy.kubernetes.templating.syntax import (
    Assign,
    Call,
    Dot,
    Field,
    If,
    Literal,
    Node,
    Pipeline,
    Place,
    Range,
    Show,
    Template,
    TemplateError,
    Text,
    Value,
    Variable,
    With,
)


class Scope:
    """The variables of a block, within those of the blocks around it."""

    def __init__(self, outer: Scope | None = None) -> None:
        self._outer = outer
        self._values: dict[str, Any] = {}

    def declare(self, name: str, value: object) -> None:
        self._values[name] = value

    def assign(self, name: str, value: object) -> None:
        """Raises `KeyError` if no block around has declared it."""
        self._home(name)._values[name] = value

    def __getitem__(self, name: str) -> Any:
        return self._home(name)._values[name]

    def _home(self, name: str) -> Scope:
        if name in self._values:
            return self
        if self._outer is None:
            raise KeyError(f"no variable ${name}")
        return self._outer._home(name)


class Templates:
    """The templates of one chart. `functions` are those that know the chart or the cluster, beside the general ones."""

    def __init__(self, files: Iterable[Template], functions: Mapping[str, Callable[..., Any]]) -> None:
        self._named = {name: nodes for file in files for name, nodes in file.defined.items()}
        self._functions = {**FUNCTIONS, **functions, "include": self._include}

    def render(self, nodes: Sequence[Node], dot: object) -> str:
        """Raises `TemplateError`, which says where."""
        scope = Scope()
        scope.declare("", dot)
        return "".join(self._run(nodes, dot, scope))

    def _include(self, name: str, dot: object) -> str:
        if name not in self._named:
            raise KeyError(f"no template {name}")
        return self.render(self._named[name], dot)

    def _run(self, nodes: Sequence[Node], dot: object, scope: Scope) -> Iterator[str]:
        for node in nodes:
            if isinstance(node, Text):
                yield node.text
            elif isinstance(node, Show):
                yield text_of(self._at(node.place, node.value, dot, scope))
            elif isinstance(node, Assign):
                value = self._at(node.place, node.value, dot, scope)
                (scope.declare if node.declares else scope.assign)(node.name, value)
            elif isinstance(node, If):
                taken = node.then if self._at(node.place, node.condition, dot, scope) else node.otherwise
                yield from self._run(taken, dot, Scope(scope))
            elif isinstance(node, With):
                yield from self._with(node, dot, scope)
            else:
                yield from self._range(node, dot, scope)

    def _with(self, node: With, dot: object, scope: Scope) -> Iterator[str]:
        value = self._at(node.place, node.value, dot, scope)
        inner = Scope(scope)
        if node.name is not None:
            inner.declare(node.name, value)
        if value:
            yield from self._run(node.then, value, inner)
        else:
            yield from self._run(node.otherwise, dot, inner)

    def _range(self, node: Range, dot: object, scope: Scope) -> Iterator[str]:
        value = self._at(node.place, node.value, dot, scope) or []
        items: list[tuple[Any, Any]] = sorted(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
        for key, item in items:
            inner = Scope(scope)
            if node.key is not None:
                inner.declare(node.key, key)
            if node.item is not None:
                inner.declare(node.item, item)
            yield from self._run(node.body, item, inner)
        if not items:
            yield from self._run(node.otherwise, dot, Scope(scope))

    # --- values ------------------------------------------------------------------------------------------------------

    def _at(self, place: Place, value: Value, dot: object, scope: Scope) -> Any:
        """Raises `TemplateError` with the place of what is wrong, which may be in an included template."""
        try:
            return self._value(value, dot, scope)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise TemplateError(f"{place}: {error.args[0] if error.args else error}") from error

    def _value(self, value: Value, dot: object, scope: Scope) -> Any:
        if isinstance(value, Literal):
            return value.value
        if isinstance(value, Dot):
            return dot
        if isinstance(value, Variable):
            return scope[value.name]
        if isinstance(value, Field):
            return _field(self._value(value.of, dot, scope), value.name)
        if isinstance(value, Pipeline):
            first, *others = value.commands
            result = self._value(first, dot, scope)
            for command in others:
                if not isinstance(command, Call):
                    raise TypeError("only a function can take what comes by a pipe")
                result = self._call(command, dot, scope, result)
            return result
        return self._call(value, dot, scope)

    def _call(self, call: Call, dot: object, scope: Scope, *piped: object) -> Any:
        if call.function in ("and", "or"):
            return self._first(call, dot, scope, *piped)
        function = self._functions.get(call.function)
        if function is None:
            raise LookupError(f"unknown function {call.function}")
        return function(*(self._value(argument, dot, scope) for argument in call.arguments), *piped)

    def _first(self, call: Call, dot: object, scope: Scope, *piped: object) -> Any:
        """`and`: the first empty argument, or else the last; `or`: the first that is not. The rest is not looked at."""
        result: Any = None
        for argument in (*call.arguments, *map(Literal, piped)):
            result = self._value(argument, dot, scope)
            if bool(result) is (call.function == "or"):
                break
        return result


def _field(of: Any, name: str) -> Any:
    """A key that is not there is nil; nil itself has no keys."""
    if isinstance(of, Mapping):
        return of.get(name)
    if of is None:
        raise LookupError(f"nothing there that could have .{name}")
    raise TypeError(f".{name} of {type(of).__name__}, which has no keys")

"""From YAML text and `--set` values to a typed `Section`, with errors that point at the place.

The text is read as a tree of nodes, which know their lines, and flattened to settings by full key ("kv.page_size"), so
that a `--set` replaces one and a later check can still say where a value came from. All errors are `ConfigError`: the
place (file:line, or the --set), the full key, what was expected and what was found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeVar

import msgspec
import yaml
from msgspec import inspect

from cluster.errors import ConfigError
from cluster.section import Section

SectionT = TypeVar("SectionT", bound=Section)

_LONGEST_QUOTE = 60
_ERROR_PATH = re.compile(r"at `\$(?P<path>[^`]*)`$")


class Setting(NamedTuple):
    """A value as written, and the place where it was written."""

    value: object
    place: str


Settings = Mapping[str, Setting]
"""By full key."""

Locate = Callable[[yaml.Node], str]
"""The place of a node."""


def read_yaml(text: str, origin: str, shape: type[Section]) -> dict[str, Setting]:
    """The settings in `text`, a YAML mapping in the form of `shape`; `origin` is its name in errors."""

    def locate(node: yaml.Node) -> str:
        return f"{origin}:{node.start_mark.line + 1}"

    root = _compose(text, lambda line: f"{origin}:{line}")
    return {} if root is None else dict(_flatten(root, shape, "", locate))


def read_override(override: str, shape: type[Section]) -> dict[str, Setting]:
    """The settings of one `--set` value: KEY=VALUE, where VALUE is YAML; for a whole section a mapping."""
    place = f"--set {override}"
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"{place}: expected KEY=VALUE")
    target: Any = shape
    prefix = ""
    for part in key.strip().split("."):
        if not _is_section(target):
            raise ConfigError(f"{place}: {prefix} has no keys of its own: expected {describe(target)}")
        target = _field_type(target, part, prefix, place)
        prefix = _join(prefix, part)
    node = _compose(text, lambda _line: place) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
    if _is_section(target):
        return dict(_flatten(node, target, prefix, lambda _node: place))
    return {prefix: Setting(_construct(node, place, prefix), place)}


def build(shape: type[SectionT], settings: Settings, origin: str, prefix: str = "") -> SectionT:
    """A `shape` of the settings below `prefix`, with defaults; `origin` is where a required one is missing."""
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(shape):
        key = _join(prefix, field.encode_name)
        if _is_section(field.type):
            values[field.name] = build(field.type, settings, origin, key)
        elif key in settings:
            values[field.name] = _convert(settings[key], field.type, key)
        elif field.required:
            raise ConfigError(f"{origin}: {key}: missing; expected {describe(field.type)}")
    return shape(**values)


def describe(kind: Any) -> str:
    """What a value of this type looks like, in words."""
    return _describe(inspect.type_info(kind))


# --- reading nodes ---------------------------------------------------------------------------------------------------


def _compose(text: str, place: Callable[[int], str]) -> yaml.Node | None:
    """The node of a YAML document; None if it is empty. `place` names a line, counted from 1."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"{place(mark.line + 1 if mark else 1)}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{place(1)}: not valid YAML: {error}") from error


def _flatten(node: yaml.Node, shape: type[Section], prefix: str, locate: Locate) -> Iterator[tuple[str, Setting]]:
    """The settings of a mapping in the form of `shape`."""
    if node.tag == "tag:yaml.org,2002:null":
        return  # a section whose keys are all commented out
    if not isinstance(node, yaml.MappingNode):
        found = quote(_construct(node, locate(node), prefix))
        raise ConfigError(f"{locate(node)}: {prefix or 'topology'}: expected {_keys_of(shape, prefix)}, found {found}")
    first: dict[str, str] = {}
    for key_node, value_node in node.value:
        place = locate(key_node)
        name = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        kind = _field_type(shape, name, prefix, place)
        key = _join(prefix, name)
        if name in first:
            raise ConfigError(f"{place}: {key}: given a second time, first at {first[name]}")
        first[name] = place
        if _is_section(kind):
            yield from _flatten(value_node, kind, key, locate)
        else:
            yield key, Setting(_construct(value_node, locate(value_node), key), locate(value_node))


def _construct(node: yaml.Node, place: str, key: str) -> object:
    """The node's value. Dates and the like may be of the right form and yet impossible: that is a ValueError."""
    try:
        value: object = yaml.constructor.SafeConstructor().construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{place}: {key}: not a value: {problem}") from error
    return value


def _field_type(shape: type[Section], name: str, prefix: str, place: str) -> Any:
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(shape)}
    if name in fields:
        return fields[name]
    near = get_close_matches(name, fields, n=1)
    guess = f"did you mean {_join(prefix, near[0])}? " if near else ""
    raise ConfigError(f"{place}: {_join(prefix, name)}: unknown key; {guess}expected {_keys_of(shape, prefix)}")


# --- from settings to sections ---------------------------------------------------------------------------------------


def _convert(setting: Setting, kind: Any, key: str) -> object:
    try:
        value: object = msgspec.convert(setting.value, kind)
    except msgspec.ValidationError as error:
        inner = _ERROR_PATH.search(str(error))
        raise ConfigError(
            f"{setting.place}: {key}{inner['path'] if inner else ''}: "
            f"expected {describe(kind)}, found {quote(setting.value)}"
        ) from error
    return value


def quote(value: object) -> str:
    """A value from YAML, in words: that 16 and "16" differ is the point of many an error."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = f'the text "{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}…"


def _describe(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.EnumType):
        return "one of " + ", ".join(member.value for member in kind.cls)
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_describe(choice) for choice in kind.types)
    if isinstance(kind, inspect.ListType):
        return f"a list, each entry {_describe(kind.item_type)}"
    if isinstance(kind, inspect.DictType):
        return f"a mapping from names, each to {_describe(kind.value_type)}"
    if isinstance(kind, inspect.IntType):
        return f"a whole number{_bounds(kind)}"
    if isinstance(kind, inspect.FloatType):
        return f"a number{_bounds(kind)}"
    words = {
        inspect.StrType: "text",
        inspect.BoolType: "true or false",
        inspect.NoneType: "nothing",
        inspect.AnyType: "a value",
    }
    return words.get(type(kind), "another value")


def _bounds(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.ge is not None and kind.le is not None:
        return f" from {kind.ge} to {kind.le}"
    if kind.ge is not None:
        return f" of at least {kind.ge}"
    return f" greater than {kind.gt}" if kind.gt is not None else ""


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _keys_of(shape: type[Section], prefix: str) -> str:
    names = ", ".join(field.encode_name for field in msgspec.structs.fields(shape))
    return f"{f'keys of {prefix}' if prefix else 'one of the sections'}: {names}"


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name

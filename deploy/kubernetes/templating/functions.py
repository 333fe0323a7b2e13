"""The functions of Go's text/template, of Sprig and of Helm that our chart uses, by their names there."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import secrets
import string
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import yaml

from deploy.kubernetes.templating.yaml_text import read, written


def text_of(value: object) -> str:
    """What a value looks like in the text."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _to_json(value: object) -> str:
    """Go's way, byte for byte, since checksums are made of it: sorted keys, whole floats as integers, no < > & as they
    are."""
    text = json.dumps(_whole(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _from_yaml(text: str) -> dict[str, Any]:
    """As Helm's: a mapping, and what is wrong with the text is its key Error."""
    try:
        value = read(text)
    except yaml.YAMLError as error:
        return {"Error": str(error)}
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"Error": "not a mapping"}


def _fail(message: str) -> None:
    raise ValueError(message)


def _dict(*pairs: Any) -> dict[str, Any]:
    return dict(zip(pairs[::2], pairs[1::2], strict=True))


def _printf(form: str, *values: object) -> str:
    """Of Go's verbs, %s and %v alone."""
    return form.replace("%v", "%s") % tuple(map(text_of, values))


def _indent(spaces: int, text: str) -> str:
    return "\n".join(" " * spaces + line for line in text.split("\n"))


def _equal(first: object, *others: object) -> bool:
    return any(first == other for other in others)


_KINDS: Mapping[type, str] = MappingProxyType({str: "string", dict: "map", list: "slice", bool: "bool"})


def _kind_is(kind: str, value: object) -> bool:
    return _KINDS.get(type(value), "invalid" if value is None else "number") == kind


def _omit(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "add": lambda *terms: sum(int(term) for term in terms),
        "b64enc": lambda text: base64.b64encode(text.encode()).decode(),
        "ceil": lambda value: float(math.ceil(value)),
        "contains": lambda part, text: part in text,
        "default": lambda fallback, value=None: value or fallback,
        "dict": _dict,
        "div": lambda first, second: int(first) // int(second),
        "eq": _equal,
        "fail": _fail,
        "fromYaml": _from_yaml,
        "gt": lambda first, second: first > second,
        "hasKey": lambda mapping, key: key in mapping,
        "index": lambda mapping, key: mapping.get(key),
        "int": lambda value: int(value or 0),
        "kindIs": _kind_is,
        "list": lambda *items: list(items),
        "lower": str.lower,
        "mul": lambda *factors: math.prod(int(factor) for factor in factors),
        "mulf": lambda *factors: math.prod(float(factor) for factor in factors),
        "ne": lambda first, second: first != second,
        "nindent": lambda spaces, text: "\n" + _indent(spaces, text),
        "not": lambda value: not value,
        "omit": _omit,
        "printf": _printf,
        "quote": lambda value: json.dumps(text_of(value), ensure_ascii=False),
        "randAlphaNum": lambda count: "".join(
            secrets.choice(string.ascii_letters + string.digits) for _ in range(count)
        ),
        "sha256sum": lambda text: hashlib.sha256(text.encode()).hexdigest(),
        "ternary": lambda yes, no, condition: yes if condition else no,
        "toYaml": written,
        "toJson": _to_json,
        "toString": text_of,
        "trimSuffix": lambda suffix, text: text.removesuffix(suffix),
        "trunc": lambda count, text: text[:count],
    }
)
"""All but those that know the chart (`include`, `lookup`). What the chart no longer uses is taken out: a test
compares."""

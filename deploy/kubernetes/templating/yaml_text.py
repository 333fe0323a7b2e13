"""YAML in and out: by libyaml where PyYAML has it, which is ten times as fast."""

from __future__ import annotations

from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_WIDTH = 1 << 20
"""Lines are not broken: what is put into a template is indented line by line."""


def read(text: str) -> Any:
    """The one document in `text`. Raises `yaml.YAMLError`."""
    return yaml.load(text, _LOADER)


def read_all(text: str) -> list[Any]:
    """All documents in `text`. Raises `yaml.YAMLError`."""
    return list(yaml.load_all(text, _LOADER))


def written(value: object) -> str:
    """With sorted keys, as Helm writes it; no line break at the end."""
    text: str = yaml.dump(value, Dumper=_DUMPER, default_flow_style=False, width=_WIDTH, allow_unicode=True)
    return text.removesuffix("...\n").rstrip("\n")


def written_all(values: list[Any]) -> str:
    """One document for each, their keys in the order that they have."""
    text: str = yaml.dump_all(
        values, Dumper=_DUMPER, sort_keys=False, explicit_start=True, width=_WIDTH, allow_unicode=True
    )
    return text

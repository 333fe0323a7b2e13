"""The Helm chart, rendered without Helm: values in, Kubernetes objects out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cluster.errors import ConfigError
from cluster.settings import build, read_yaml
from deploy.kubernetes.templating.evaluate import Templates
from deploy.kubernetes.templating.syntax import Template, TemplateError, parse
from deploy.kubernetes.templating.yaml_text import read, read_all
from deploy.kubernetes.values import Values

CHART = Path(__file__).parent / "chart"

Object = dict[str, Any]
"""One Kubernetes object, as its YAML says it."""

_BEFORE_PODS = ("ServiceAccount", "Secret", "ConfigMap", "NetworkPolicy", "Service")
"""Kinds that pods need, in the order in which they are to be made; the others follow."""


class Release(NamedTuple):
    """One installation of the chart, in Helm's words."""

    name: str
    namespace: str


class Chart:
    """Read once from `folder`. Raises `ConfigError` for what is no chart, or not in the part of Helm's language that we
    know."""

    def __init__(self, folder: Path = CHART) -> None:
        self._about: dict[str, Any] = read((folder / "Chart.yaml").read_text(encoding="utf-8"))
        defaults = (folder / "values.yaml").read_text(encoding="utf-8")
        self._defaults: dict[str, Any] = read(defaults)
        self._settings = read_yaml(defaults, "values.yaml", Values)
        self._files: dict[str, Template] = {
            file.name: parse(file.read_text(encoding="utf-8"), file.name)
            for file in sorted((folder / "templates").iterdir())
            if file.suffix in (".yaml", ".tpl")
        }

    def render(self, topology: str | Mapping[str, Any], values: str, origin: str, release: Release) -> list[Object]:
        """The objects of a cluster. `values` is YAML that goes over the chart's own (`origin` is its name in errors),
        `topology` the text or the content of a topology. Secrets are made anew each time, see values.yaml.

        Raises `ConfigError` for values that are wrong, with their place, and for what the templates refuse.
        """
        build(Values, {**self._settings, **read_yaml(values, origin, Values)}, origin)
        merged = merge(self._defaults, read(values) or {})
        dot = {
            "Values": {**merged, "topology": topology},
            "Release": {"Name": release.name, "Namespace": release.namespace},
            "Chart": {"Name": self._about["name"], "AppVersion": self._about["appVersion"]},
        }
        templates = Templates(self._files.values(), {"lookup": _lookup})
        objects = [
            made
            for name, file in self._files.items()
            if name.endswith(".yaml")
            for made in _objects(name, templates.render(file.nodes, dot))
        ]
        return sorted(objects, key=lambda made: _order(made["kind"]))


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` upon `under`, as Helm does it: mappings key by key, everything else as a whole; null takes a key away."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def _lookup(version: str, kind: str, namespace: str, name: str) -> Object:
    """What the cluster has of that name: we don't ask it."""
    return {}


def _objects(file: str, text: str) -> list[Object]:
    try:
        return [made for made in read_all(text) if made]
    except yaml.YAMLError as error:
        raise TemplateError(f"{file}: what it makes of these values is not YAML: {error}") from error


def _order(kind: str) -> int:
    return _BEFORE_PODS.index(kind) if kind in _BEFORE_PODS else len(_BEFORE_PODS)


def read_values(file: Path | None) -> tuple[str, str]:
    """The text of a file of values, and its name in errors; without one there are none. Raises `ConfigError`."""
    if file is None:
        return "", "values"
    try:
        return file.read_text(encoding="utf-8"), str(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the values can't be read: {error}") from error

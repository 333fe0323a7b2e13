"""Grafana's dashboards as far as ours need them: panels in rows, and the JSON that Grafana imports.

A `Dashboard` is a plain value; `render` lays its panels out on Grafana's grid of 24 columns, gives them their numbers
and fills in what all panels have in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, Union

import msgspec

SCHEMA_VERSION = 39
"""Of Grafana 11's dashboards; later ones read it, too."""
GRID_COLUMNS = 24
GRAPH_HEIGHT = 8
STAT_HEIGHT = 4
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
"""A variable: whoever imports the dashboard chooses."""


class Unit(str, Enum):
    """Grafana's names."""

    SECONDS = "s"
    PER_SECOND = "reqps"
    TOKENS_PER_SECOND = "suffix: tok/s"
    BYTES = "bytes"
    BYTES_PER_SECOND = "Bps"
    SHARE = "percentunit"
    COUNT = "short"


class Query(msgspec.Struct, frozen=True):
    expression: str
    """PromQL."""
    legend: str = ""
    """With labels in braces: {{worker}}."""


class Graph(msgspec.Struct, frozen=True):
    """Lines over time; `stacked` where their sum means something."""

    title: str
    about: str
    unit: Unit
    queries: Sequence[Query]
    stacked: bool = False


class Stat(msgspec.Struct, frozen=True):
    """One figure, as of now; from `warn` on yellow, from `bad` on red (or the other way round)."""

    title: str
    about: str
    unit: Unit
    query: Query
    warn: float | None = None
    bad: float | None = None


Panel = Union[Graph, Stat]


class Row(msgspec.Struct, frozen=True):
    """Panels side by side, each as wide as the others."""

    title: str
    panels: Sequence[Panel]


class Variable(msgspec.Struct, frozen=True):
    """A choice at the head of the dashboard: the values of `label` in `series`."""

    name: str
    series: str
    label: str
    all_values: bool = True
    """Whether "All" may be chosen, and is at first."""


class Dashboard(msgspec.Struct, frozen=True):
    uid: str
    """Part of its URL: it stays when the title changes."""
    title: str
    about: str
    variables: Sequence[Variable]
    rows: Sequence[Row]

    @property
    def panels(self) -> Iterator[Panel]:
        for row in self.rows:
            yield from row.panels

    @property
    def expressions(self) -> Iterator[str]:
        """All PromQL of it."""
        for panel in self.panels:
            for query in queries_of(panel):
                yield query.expression


def queries_of(panel: Panel) -> Sequence[Query]:
    return panel.queries if isinstance(panel, Graph) else [panel.query]


def render(dashboard: Dashboard) -> bytes:
    """The JSON, indented, the same for the same dashboard."""
    model = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["baton"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [
            {
                "type": "dashboards", "tags": ["baton"], "title": "Baton", "asDropdown": True,
                "includeVars": True, "keepTime": True,
            },
        ],
        "templating": {"list": [_datasource_variable(), *map(_variable, dashboard.variables)]},
        "panels": _laid_out(dashboard.rows),
    }  # fmt: skip
    return msgspec.json.format(msgspec.json.encode(model), indent=2) + b"\n"


def _laid_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each row under its heading; `id` and place of each panel."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        heading = {"type": "row", "title": row.title, "collapsed": False, "panels": []}
        panels.append({**heading, "id": len(panels) + 1, "gridPos": _place(0, top, GRID_COLUMNS, 1)})
        top += 1
        width = GRID_COLUMNS // len(row.panels)
        height = max(STAT_HEIGHT if isinstance(panel, Stat) else GRAPH_HEIGHT for panel in row.panels)
        for index, panel in enumerate(row.panels):
            place = _place(index * width, top, width, height)
            panels.append({**_panel(panel), "id": len(panels) + 1, "gridPos": place})
        top += height
    return panels


def _place(left: int, top: int, width: int, height: int) -> dict[str, int]:
    return {"x": left, "y": top, "w": width, "h": height}


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "expr": query.expression,
            "legendFormat": query.legend or "__auto",
            "instant": isinstance(panel, Stat),
            "range": not isinstance(panel, Stat),
        }
        for index, query in enumerate(queries_of(panel))
    ]
    common = {"title": panel.title, "description": panel.about, "datasource": DATASOURCE, "targets": targets}
    return {**common, **(_graph(panel) if isinstance(panel, Graph) else _stat(panel))}


def _graph(graph: Graph) -> dict[str, Any]:
    custom = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 25 if graph.stacked else 8,
        "showPoints": "never",
        "stacking": {"mode": "normal" if graph.stacked else "none", "group": "A"},
    }
    return {
        "type": "timeseries",
        "fieldConfig": {"defaults": {"unit": graph.unit.value, "min": 0, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _stat(stat: Stat) -> dict[str, Any]:
    return {
        "type": "stat",
        "fieldConfig": {
            "defaults": {"unit": stat.unit.value, "thresholds": {"mode": "absolute", "steps": _steps(stat)}},
            "overrides": [],
        },
        "options": {
            "colorMode": "value",
            "graphMode": "area",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        },
    }


def _steps(stat: Stat) -> list[dict[str, Any]]:
    """Rising values, the first one without: Grafana's order, whether much is bad or little."""
    if stat.warn is None or stat.bad is None:
        return [{"color": "text", "value": None}]
    if stat.warn <= stat.bad:
        named = [("green", None), ("yellow", stat.warn), ("red", stat.bad)]
    else:
        named = [("red", None), ("yellow", stat.bad), ("green", stat.warn)]
    return [{"color": color, "value": value} for color, value in named]


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _variable(variable: Variable) -> dict[str, Any]:
    query = f"label_values({variable.series}, {variable.label})"
    found = {
        "name": variable.name,
        "label": variable.name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": variable.name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": variable.all_values,
        "includeAll": variable.all_values,
    }
    if variable.all_values:
        # Also what has no such label: a cluster outside of Kubernetes has no namespace.
        found |= {"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}}
    return found

"""Dashboards, rules and scrape configurations: whole, current, and telling when they should."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import msgspec
import pytest
import yaml

from deploy.observability.__main__ import FOLDER
from deploy.observability.boards import DASHBOARDS
from deploy.observability.grafana import Dashboard, Graph, Query, Row, Stat, Unit, render
from tests.promql import Asked, asked
from tests.unit.deploy.alert_cases import CASES, HOUR, AlertCase

OBSERVABILITY = FOLDER.parent
RULES = sorted((OBSERVABILITY / "rules").glob("*.yaml"))
ALERTS = {
    rule["alert"]: rule
    for path in RULES
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool comes with Debian's package prometheus")


def promtool(*arguments: str | Path) -> str:
    """What it says; fails with that if it is not content."""
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- dashboards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_what_is_checked_in_is_what_the_code_makes(dashboard):
    assert (FOLDER / f"{dashboard.uid}.json").read_bytes() == render(dashboard), "run `make dashboards`"


def test_nothing_else_is_checked_in():
    assert {path.stem for path in FOLDER.glob("*.json")} == {dashboard.uid for dashboard in DASHBOARDS}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda dashboard: dashboard.uid)
def test_panels_have_numbers_of_their_own_and_lie_side_by_side(dashboard):
    panels = msgspec.json.decode(render(dashboard))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_what_grafana_needs_of_a_panel():
    graph = Graph("g", "why", Unit.SECONDS, [Query("a", "{{b}}"), Query("c")])
    stat = Stat("s", "why", Unit.SHARE, Query("d"), warn=0.9, bad=0.5)
    heading, first, second = msgspec.json.decode(render(Dashboard("u", "t", "why", [], [Row("r", [graph, stat])])))[
        "panels"
    ]
    assert (heading["type"], heading["title"]) == ("row", "r")
    assert [(target["refId"], target["expr"], target["legendFormat"]) for target in first["targets"]] == [
        ("A", "a", "{{b}}"),
        ("B", "c", "__auto"),
    ]
    steps = second["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert [(step["color"], step["value"]) for step in steps] == [("red", None), ("yellow", 0.5), ("green", 0.9)]


# --- rules -----------------------------------------------------------------------------------------------------------


def test_every_alert_says_what_it_means_what_to_look_at_and_what_to_do():
    for name, rule in ALERTS.items():
        assert set(rule["annotations"]) == {"summary", "meaning", "look", "do"}, name
        assert rule["labels"]["severity"] in {"page", "ticket"}, name


def test_every_alert_has_its_stories():
    assert set(CASES) == set(ALERTS)


@needs_promtool
def test_promtool_finds_the_rules_and_configurations_well():
    promtool("check", "rules", *RULES)
    promtool("check", "config", OBSERVABILITY / "prometheus.yaml")


@needs_promtool
def test_promtool_finds_the_configuration_for_kubernetes_well(tmp_path):
    """Debian's knows no discovery of pods: a file takes its place."""
    config = yaml.safe_load((OBSERVABILITY / "prometheus.kubernetes.yaml").read_text())
    for job in config["scrape_configs"]:
        assert job.pop("kubernetes_sd_configs") == [{"role": "pod"}]
        job["file_sd_configs"] = [{"files": ["targets.json"]}]
    config["rule_files"] = [str(OBSERVABILITY / file) for file in config["rule_files"]]
    (tmp_path / "targets.json").write_text("[]")
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    promtool("check", "config", tmp_path / "prometheus.yaml")


def stories(cases: dict[str, AlertCase]) -> list[dict[str, object]]:
    """Two of Prometheus' rule tests: in one all of `cases` fire, in the other none; each in a namespace of its own."""

    def at_home(name, text):
        return text.replace('namespace="a"', f'namespace="{name}"')

    def told(name, case):
        labels = {**case.labels, **({"namespace": name} if case.labels else {}), **ALERTS[name]["labels"]}
        annotations = {
            key: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)
            for key, text in ALERTS[name]["annotations"].items()
        }
        return [{"exp_labels": labels, "exp_annotations": annotations}]

    def story(series_of, alerts_of):
        return {
            "interval": "1m",
            "input_series": [
                {"series": at_home(name, series), "values": values}
                for name, case in cases.items()
                for series, values in series_of(case).items()
            ],
            "alert_rule_test": [
                {"eval_time": f"{HOUR}m", "alertname": name, "exp_alerts": alerts_of(name, case)}
                for name, case in cases.items()
            ],
        }

    return [story(lambda case: case.fires, told), story(lambda case: case.quiet, lambda name, case: [])]


@needs_promtool
def test_each_alert_fires_when_it_must_and_only_then(tmp_path):
    absences = {name: case for name, case in CASES.items() if not case.fires}
    tests = stories({name: case for name, case in CASES.items() if case.fires})
    for name, case in absences.items():
        tests += stories({name: case})
    file = tmp_path / "stories.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(path) for path in RULES], "tests": tests}, width=10**6))
    promtool("test", "rules", file)


# --- what an expression asks for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("up", Asked([("up", frozenset())], frozenset())),
        (
            "histogram_quantile(0.99, sum by (role, le) (rate(a_bucket{x=~\"b{c}\",y!='d'}[$__rate_interval])))",
            Asked([("a_bucket", frozenset({"x", "y"}))], frozenset({"role", "le"})),
        ),
        (
            'a:b:c / on (n) group_left (m) d{e="f"} > 0.5 and absent(g offset 5m)',
            Asked(
                [("a:b:c", frozenset()), ("d", frozenset({"e"})), ("g", frozenset())],
                frozenset({"n", "m"}),
            ),
        ),
    ],
)
def test_metrics_and_labels_are_found_in_an_expression(expression, expected):
    assert asked(expression) == expected

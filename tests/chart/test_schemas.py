"""What the chart makes is what Kubernetes, KEDA and the Prometheus operator take."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
import yaml

from tests.chart.cases import SPREAD, TOPOLOGY_TEXTS, VALUES
from tests.chart.leader_worker_set import LeaderWorkerSet
from tests.unit.deploy.kubernetes.rendering import CHART, MINIMAL, RELEASE, REPOSITORY

pytestmark = pytest.mark.chart

PUBLISHED = ("ScaledObject", "PodMonitor")
"""Whose makers' definitions come by npm."""
GROUPS = "LeaderWorkerSet"
CHECK = Path(__file__).with_name("custom_resources.mjs")


def rendered() -> list[dict]:
    """All objects of all cases: each topology plain, and each set of values with one topology."""
    cases = [(topology, "") for topology in TOPOLOGY_TEXTS.values()] + [(MINIMAL, values) for values in VALUES.values()]
    cases += SPREAD
    return [made for topology, values in cases for made in CHART.render(topology, values, "values", RELEASE)]


def pod_templates(made: dict) -> list[dict]:
    """Those of a group's pods, as objects of their own."""
    group = made["spec"]["leaderWorkerTemplate"]
    return [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name.lower()}, "template": group[name]}
        for name in ("leaderTemplate", "workerTemplate")
    ]


def test_groups_of_pods_have_the_form_that_their_controller_takes():
    groups = [made for made in rendered() if made["kind"] == GROUPS]
    assert groups
    for made in groups:
        msgspec.convert(made, LeaderWorkerSet)
    made["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]["maxSurges"] = 1
    with pytest.raises(msgspec.ValidationError, match="maxSurges"):
        msgspec.convert(made, LeaderWorkerSet)


def test_kubernetes_takes_every_object(tools, tmp_path):
    objects = [made for made in rendered() if made["kind"] not in (*PUBLISHED, GROUPS)]
    objects += [template for made in rendered() if made["kind"] == GROUPS for template in pod_templates(made)]
    assert {"HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"} <= {made["kind"] for made in objects}
    file = tmp_path / "objects.yaml"
    file.write_text(yaml.safe_dump_all(objects))
    command = [str(tools / "bin" / "kubernetes-validate"), "--strict", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, [line for line in said.splitlines() if " passed " not in line]
    assert said.count(" passed ") == len(objects)


def test_a_misspelt_field_would_be_found(tools, tmp_path):
    file = tmp_path / "wrong.yaml"
    (deployment,) = [
        made
        for made in CHART.render(MINIMAL, "", "values", RELEASE)
        if made["metadata"]["name"] == "baton-decode" and made["kind"] == "Deployment"
    ]
    deployment["spec"]["replica"] = 1
    file.write_text(yaml.safe_dump(deployment))
    command = [str(tools / "bin" / "kubernetes-validate"), "--strict", str(file)]
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.mark.skipif(
    shutil.which("npm") is None, reason="the definitions of custom resources come by npm, which is not here"
)
def test_keda_and_the_prometheus_operator_take_theirs(tools):
    objects = [made for made in rendered() if made["kind"] in PUBLISHED]
    assert {made["kind"] for made in objects} == set(PUBLISHED)

    def check(objects: list[dict]) -> subprocess.CompletedProcess[str]:
        # Node looks for packages beside the script.
        script = shutil.copy(CHECK, tools)
        return subprocess.run(["node", script], input=json.dumps(objects), capture_output=True, text=True, check=False)

    done = check(objects)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    scaled = next(made for made in objects if made["kind"] == "ScaledObject")
    scaled["spec"]["minReplicaCount"] = "two"
    assert "minReplicaCount must be integer" in check([scaled]).stdout


def test_the_linter_of_dockerfiles_has_nothing_to_say(tools):
    command = [str(tools / "bin" / "hadolint"), str(REPOSITORY / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")

"""Helm and our own renderer make the same objects of the chart."""

from __future__ import annotations

import subprocess

import pytest
import yaml

from deploy.kubernetes.chart import CHART as FOLDER
from tests.chart.cases import SPREAD, TOPOLOGY_TEXTS, VALUES
from tests.unit.deploy.kubernetes.rendering import CHART, MINIMAL, RELEASE

pytestmark = pytest.mark.chart


class Helm:
    def __init__(self, program, folder) -> None:
        self._program = str(program)
        self._folder = folder

    def __call__(self, verb: str, topology: str, values: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        files = self._folder / "topology.yaml", self._folder / "values.yaml"
        for file, text in zip(files, (topology, values), strict=True):
            file.write_text(text)
        wanted = ("--set-file", f"topology={files[0]}", "--values", str(files[1]), "--namespace", RELEASE.namespace)
        command = [self._program, verb, *arguments, str(FOLDER), *wanted]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def template(self, topology: str, values: str) -> list[dict]:
        done = self("template", topology, values, RELEASE.name)
        assert done.returncode == 0, done.stderr
        return [made for made in yaml.safe_load_all(done.stdout) if made]


@pytest.fixture
def helm(tools, tmp_path):
    return Helm(tools / "bin" / "helm", tmp_path)


def comparable(objects: list[dict]) -> dict:
    """By kind and name. A secret is another each time."""
    found = {}
    for made in objects:
        if made["kind"] == "Secret":
            made = made | {"data": {key: len(value) for key, value in made["data"].items()}}
        found[made["kind"], made["metadata"]["name"]] = made
    assert len(found) == len(objects)
    return found


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_lint_finds_nothing_to_say(helm, values):
    done = helm("lint", MINIMAL, values, "--strict")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("topology", TOPOLOGY_TEXTS.values(), ids=TOPOLOGY_TEXTS)
def test_both_make_the_same_objects(helm, topology, values):
    if "nvidia.com/gpu" in values and "nodes: 2" in topology:
        pytest.skip("a pod of several ranks has as many GPUs")
    expect_the_same_objects(helm, topology, values)


@pytest.mark.parametrize(("topology", "values"), SPREAD)
def test_both_make_the_same_groups_of_pods(helm, topology, values):
    assert helm("lint", topology, values, "--strict").returncode == 0
    expect_the_same_objects(helm, topology, values)


def expect_the_same_objects(helm, topology, values) -> None:
    ours = comparable(CHART.render(topology, values, "values", RELEASE))
    helms = comparable(helm.template(topology, values))
    assert ours.keys() == helms.keys()
    for name, made in ours.items():
        assert made == helms[name]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ("prefil: {}", "additional properties 'prefil' not allowed"),
        ("router: {replicas: 0}", "/router/replicas"),
        ("autoscaling: {kind: knative}", "/autoscaling/kind"),
    ],
)
def test_helm_refuses_wrong_values(helm, values, complaint):
    done = helm("template", MINIMAL, values, RELEASE.name)
    assert done.returncode != 0 and complaint in done.stderr


def test_helm_asks_for_a_topology(tools):
    done = subprocess.run([tools / "bin" / "helm", "template", FOLDER], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "give one by --set-file topology=my-cluster.yaml" in done.stderr

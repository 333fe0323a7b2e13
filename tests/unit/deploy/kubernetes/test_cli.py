"""`baton kubernetes render`, as it is called."""

import subprocess
import sys

import pytest
import yaml

from tests.unit.deploy.kubernetes.rendering import MINIMAL


@pytest.fixture
def render(tmp_path):
    file = tmp_path / "cluster.yaml"
    values = tmp_path / "values.yaml"
    values.write_text("image: {repository: registry.example/baton, tag: 1.2.3}\n")
    file.write_text(f"# Ours.\n{MINIMAL}kubernetes: {{namespace: inference, values_file: {values}}}\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy.cli", "kubernetes", "render", str(file), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def test_what_is_printed_can_be_applied(render):
    done = render("--no-secrets")
    assert (done.returncode, done.stderr) == (0, "")
    objects = list(yaml.safe_load_all(done.stdout))
    assert "Secret" not in {made["kind"] for made in objects}
    assert {made["metadata"]["namespace"] for made in objects} == {"inference"}
    (topology,) = [made["data"]["topology.yaml"] for made in objects if made["kind"] == "ConfigMap"]
    assert topology.startswith("# Ours."), "as it was written"
    (decode,) = [made for made in objects if (made["kind"], made["metadata"]["name"]) == ("Deployment", "baton-decode")]
    assert decode["spec"]["template"]["spec"]["containers"][0]["image"] == "registry.example/baton:1.2.3"


def test_settings_and_names_may_be_given_beside_the_files(render):
    done = render("--set", "decode.replicas=3", "--namespace", "other", "--name", "llm")
    assert done.returncode == 0 and "Secrets are new each time" in done.stderr
    sizes = {
        (made["metadata"]["namespace"], made["metadata"]["name"]): made["spec"]["replicas"]
        for made in yaml.safe_load_all(done.stdout)
        if made["kind"] == "Deployment"
    }
    assert sizes["other", "llm-baton-decode"] == 3


def test_a_wrong_setting_ends_with_its_place(render, tmp_path):
    (tmp_path / "values.yaml").write_text("router:\n  replicas: none\n")
    done = render()
    assert (done.returncode, done.stdout) == (2, "")
    assert 'values.yaml:2: router.replicas: expected a whole number of at least 1, found the text "none"' in done.stderr

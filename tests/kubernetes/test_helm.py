"""Helm itself installs and upgrades the chart. Pods find no node: what they do is tested elsewhere."""

from __future__ import annotations

import subprocess

import pytest

from deploy.kubernetes.chart import CHART
from tests.chart.tools import cache_folder
from tests.kubernetes.installation import TOPOLOGY

HELM = cache_folder() / "bin" / "helm"
pytestmark = [
    pytest.mark.kubernetes,
    pytest.mark.skipif(not HELM.exists(), reason="Helm is not here: `make test-chart` fetches it"),
]
COMPONENTS = ("bootstrap", "prefill", "decode", "router")
SETTINGS = (
    *(f"{component}.nodeSelector.nowhere=yes" for component in COMPONENTS),
    "podDisruptionBudget.enabled=false",  # policy/v1 is newer than this server
)


@pytest.fixture
def helm(kubernetes, namespace):
    def run(verb: str, *settings: str) -> None:
        where = (f"--kubeconfig={kubernetes.kubeconfig}", f"--namespace={namespace}")
        wanted = [f"--set={setting}" for setting in (*SETTINGS, *settings)]
        command = [HELM, verb, "baton", CHART, *where, f"--set-file=topology={TOPOLOGY}", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return run


def test_an_upgrade_keeps_secrets_and_replaces_only_what_has_changed(kubernetes, namespace, helm):
    def seen() -> tuple[dict, dict]:
        secrets = kubernetes.get("secrets", "--namespace", namespace, "--field-selector=type=Opaque")["items"]
        deployments = kubernetes.get("deployments", "--namespace", namespace)["items"]
        return (
            {made["metadata"]["name"]: made["data"] for made in secrets},
            {made["metadata"]["name"]: made["spec"]["template"] for made in deployments},
        )

    helm("install")
    secrets, templates = seen()
    assert set(secrets) == {"baton-cluster", "baton-api-keys"}
    assert set(templates) == {f"baton-{component}" for component in COMPONENTS}
    helm("upgrade", "router.preStopSeconds=9")
    kept, changed = seen()
    assert kept == secrets
    assert [name for name in templates if templates[name] != changed[name]] == ["baton-router"]


def test_an_upgrade_leaves_a_pool_alone_that_others_scale(kubernetes, namespace, helm):
    helm("install", "autoscaling.kind=external")
    kubernetes.kubectl("--namespace", namespace, "scale", "deployment/baton-decode", "--replicas=4")
    helm("upgrade", "autoscaling.kind=external", "router.preStopSeconds=9")
    found = kubernetes.get("deployment", "baton-decode", "--namespace", namespace)
    assert found["spec"]["replicas"] == 4

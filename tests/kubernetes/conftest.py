"""One Kubernetes for all tests: its start takes a while, and each test has a namespace of its own."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.kubernetes.control_plane import ControlPlane
from tests.kubernetes.kubelet.container import Image
from tests.kubernetes.kubelet.node import NodeSpec

REPOSITORY = Path(__file__).parents[2]
NODES = (
    NodeSpec("cpu-0", {"cpu": "64", "memory": "128Gi", "pods": "50"}, {}),
    NodeSpec("gpu-0", {"cpu": "16", "memory": "64Gi", "pods": "20", "nvidia.com/gpu": "3"}, {}),
)
IMAGE = Image(
    layers=(str(REPOSITORY), sys.prefix, sys.base_prefix),
    environment={
        "PATH": f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(Path.home()),
        "PYTHONDONTWRITEBYTECODE": "1",
    },
    entrypoint=(),
)


@pytest.fixture(scope="session")
def kubernetes(tmp_path_factory):
    plane = ControlPlane(Path(os.environ["BATON_TEST_KUBERNETES"]), tmp_path_factory.mktemp("kubernetes"), NODES, IMAGE)
    try:
        plane.start()
        yield plane
    finally:
        plane.stop()


@pytest.fixture(scope="session", autouse=True)
def kubectl_finds_it(kubernetes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(kubernetes.kubeconfig))
        yield


@pytest.fixture
def namespace(kubernetes, request):
    """For one test; its pods end with it."""
    name = re.sub("[^a-z0-9]+", "-", request.node.name)[-50:].strip("-")
    kubernetes.kubectl("create", "namespace", name)
    yield name
    kubernetes.kubectl("delete", "all", "--all", "-n", name, "--grace-period=1")
    kubernetes.kubectl("delete", "namespace", name, "--wait=false")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Puts the last lines of all logs into the report of a failed test."""
    report = yield
    given = getattr(item, "funcargs", {})
    if report.failed and "kubernetes" in given:
        report.sections.append(("logs of the cluster", given["kubernetes"].tail(given.get("namespace", ""))))
    return report

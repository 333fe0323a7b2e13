"""What is asked of kubectl, and what is refused before anything is asked; the rest needs a real Kubernetes: see
tests/kubernetes. Here kubectl is a script that writes down what it is told, and knows what the test says."""

import json

import pytest

from cluster.clock import ManualClock
from cluster.config import LauncherName, Model, Topology
from cluster.errors import LaunchError
from cluster.launch_config import Kubernetes
from cluster.messages import Role
from deploy.launchers.kubernetes import KubernetesCluster, KubernetesLauncher
from tests.unit.deploy.test_pods import deployment, pod

TOPOLOGY = Topology(
    model=Model(path="m"), launch=LauncherName.KUBERNETES, kubernetes=Kubernetes(context="c", namespace="n")
)
LABELS = {"app.kubernetes.io/name": "baton", "app.kubernetes.io/instance": "b"}
SCRIPT = """#!/bin/sh
cd "$(dirname "$0")"
echo "$*" >> calls
case "$*" in
*"get deploy"*) cat deployments;;
*"get pods"*) cat pods;;
*"get secrets"*) cat secrets;;
*"apply"*) cat > applied;;
*"logs"*) echo "the weights are made of cheese";;
*"scale"*) echo "error: no such pool" >&2; exit 1;;
esac
"""


def made(kind, name):
    return {"kind": kind, "metadata": {"name": name, "labels": LABELS}}


OBJECTS = [made("Secret", "b-cluster"), made("Secret", "b-api-keys"), made("Deployment", "baton-decode")]


class House:
    """A folder with such a kubectl."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "kubectl").write_text(SCRIPT)
        (folder / "kubectl").chmod(0o755)
        self.told = []
        self.knows([deployment()], [pod()])

    def knows(self, deployments, pods, secrets=""):
        (self.folder / "deployments").write_text(json.dumps({"items": deployments}))
        (self.folder / "pods").write_text(json.dumps({"items": pods}))
        (self.folder / "secrets").write_text(secrets)

    def cluster(self, objects=OBJECTS):
        return KubernetesCluster(TOPOLOGY, objects, ManualClock(), 1.0, self.told.append)

    async def start(self):
        return await KubernetesLauncher(TOPOLOGY, OBJECTS, ManualClock(), self.told.append).start(1.0)

    def calls(self, word):
        return [line for line in (self.folder / "calls").read_text().splitlines() if word in line]


@pytest.fixture
def house(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return House(tmp_path)


async def test_secrets_that_are_there_are_kept(house):
    house.knows([deployment()], [pod()], secrets="secret/b-cluster\nsecret/other\n")
    await house.start()
    applied = json.loads((house.folder / "applied").read_text())
    assert [each["metadata"]["name"] for each in applied["items"]] == ["b-api-keys", "baton-decode"]
    assert all(line.startswith("--namespace=n --context=c ") for line in house.calls("get"))


async def test_a_pool_that_the_topology_has_no_more_is_deleted(house):
    old = deployment()
    old["metadata"]["name"] = "baton-prefill"
    house.knows([deployment(), old], [pod()])
    await house.start()
    assert [line.split()[2:] for line in house.calls("delete")] == [
        ["delete", "deployment/baton-prefill", "--wait=false"]
    ]


GROUPS = [*OBJECTS[:2], made("LeaderWorkerSet", "baton-decode")]


def groups(replicas):
    return {**deployment(replicas, replicas), "kind": "LeaderWorkerSet"}


async def test_of_a_pool_of_groups_the_last_ones_leave_and_only_they(house):
    house.knows([groups(2)], [pod("baton-decode-0"), pod("baton-decode-1")])
    cluster = house.cluster(GROUPS)
    with pytest.raises(LaunchError, match=r"leaderworkerset/baton-decode can give up its last workers only: .*-1$"):
        await cluster.drain(["baton-decode-0"])
    with pytest.raises(LaunchError, match="no such pool"):  # as our kubectl says to whatever is scaled
        await cluster.drain(["baton-decode-1"])
    assert [line.split()[2:] for line in house.calls("scale")] == [
        ["scale", "leaderworkerset/baton-decode", "--replicas=1"]
    ]
    assert not house.calls("delete"), "which pods end, its controller says"
    assert house.calls("get deployments.apps,leaderworkersets.leaderworkerset.x-k8s.io")


async def test_a_pool_that_is_one_of_groups_now_is_no_deployment_any_more(house):
    house.knows([deployment(), groups(1)], [pod()])
    await KubernetesLauncher(TOPOLOGY, GROUPS, ManualClock(), house.told.append).start(1.0)
    assert [line.split()[2:] for line in house.calls("delete")] == [
        ["delete", "deployment/baton-decode", "--wait=false"]
    ]


async def test_who_ends_again_and_again_ends_the_start_with_its_last_words(house):
    looping = {"restartCount": 3, "state": {"running": {}}}
    house.knows([deployment(ready=0)], [pod(ready=False, container=looping)])
    with pytest.raises(LaunchError, match="decode-a has ended 3 times; the last time:\nthe weights are made of cheese"):
        await house.start()


async def test_who_has_ended_often_in_a_long_life_and_serves_now_is_no_obstacle(house):
    house.knows([deployment()], [pod(container={"restartCount": 9})])
    await house.start()


async def test_what_helm_has_installed_is_left_to_helm(house):
    helms = deployment()
    helms["metadata"]["labels"]["app.kubernetes.io/managed-by"] = "Helm"
    house.knows([helms], [pod()])
    with pytest.raises(LaunchError, match="helm upgrade or uninstall"):
        await house.start()
    with pytest.raises(LaunchError, match="helm upgrade or uninstall"):
        await house.cluster().stop(1.0)
    assert not house.calls("apply") and not house.calls("delete")


async def test_an_autoscalers_pool_is_left_to_it(house):
    with pytest.raises(LaunchError, match="autoscalers"):
        await house.cluster([*OBJECTS, made("ScaledObject", "decode")]).scale({Role.DECODE: 2})


async def test_kubectls_complaint_is_told(house):
    with pytest.raises(LaunchError, match="kubectl scale: error: no such pool"):
        await house.cluster().scale({Role.DECODE: 2})


async def test_without_kubectl_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="kubectl is not installed"):
        await KubernetesCluster(TOPOLOGY, OBJECTS, ManualClock(), 1.0, print).status()

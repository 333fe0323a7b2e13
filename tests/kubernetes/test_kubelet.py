"""What the tests of Baton rely on: that pods of this Kubernetes are run as pods are."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.kubernetes

SERVER = str(Path(__file__).with_name("toy_server.py"))
PATIENCE = 60.0
POLL_SECONDS = 0.1
CONTAINER = {
    "name": "toy",
    "image": "none",
    "command": ["python", SERVER],
    "env": [
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "words", "key": "word"}}},
    ],
    "ports": [{"name": "http", "containerPort": 8000}],
    "startupProbe": {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 1, "failureThreshold": 60},
    "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 1},
    "livenessProbe": {"httpGet": {"path": "/live", "port": "http"}, "periodSeconds": 1, "failureThreshold": 2},
    "securityContext": {"readOnlyRootFilesystem": True},
    "volumeMounts": [
        {"name": "settings", "mountPath": "/etc/toy/settings"},
        {"name": "words", "mountPath": "/toy/words"},
        {"name": "scratch", "mountPath": "/scratch"},
    ],
}
POD = {
    "terminationGracePeriodSeconds": 5,
    "containers": [CONTAINER],
    "volumes": [
        {"name": "settings", "configMap": {"name": "settings"}},
        {"name": "words", "secret": {"secretName": "words"}},
        {"name": "scratch", "emptyDir": {}},
    ],
}


def objects(replicas, pod=POD):
    labels = {"app": "toy"}
    template = {"metadata": {"labels": labels}, "spec": pod}
    deployment = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
    service = {"selector": labels, "ports": [{"port": 80, "targetPort": "http"}]}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"a": "1"}},
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "words"}, "stringData": {"word": "psst"}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "toy"}, "spec": service},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "pods"}, "spec": {**service, "clusterIP": "None"}},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "toy"}, "spec": deployment},
    ]


@pytest.fixture
def toy(kubernetes, namespace):
    """Makes the pods of a deployment, and returns them when they are ready."""

    def make(replicas, pod=POD):
        kubernetes.kubectl("apply", "-n", namespace, "-f", "-", given=yaml.safe_dump_all(objects(replicas, pod)))
        kubernetes.kubectl("rollout", "status", "-n", namespace, "deployment/toy", f"--timeout={PATIENCE:g}s")
        pods = kubernetes.get("pods", "-n", namespace)["items"]
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    return make


def ask(address, path):
    with urllib.request.urlopen(f"http://{address}/{path}", timeout=5) as response:
        return response.read().decode()


def until(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {PATIENCE:g} s: {what}"
        time.sleep(POLL_SECONDS)
    return found


def container(kubernetes, namespace, pod):
    (status,) = kubernetes.get("pod", "-n", namespace, pod["metadata"]["name"])["status"]["containerStatuses"]
    return status


def test_a_service_leads_to_its_pods_by_address_and_by_name(kubernetes, namespace, toy):
    pods = toy(2)
    names, addresses = {pod["metadata"]["name"] for pod in pods}, {pod["status"]["podIP"] for pod in pods}
    assert len(addresses) == 2
    service = kubernetes.get("service", "-n", namespace, "toy")["spec"]["clusterIP"]
    until(lambda: {ask(service, "name") for _ in range(4)} == names, "both pods answer")
    pod = f"{pods[0]['status']['podIP']}:8000"
    assert ask(pod, f"resolve/toy.{namespace}.svc") == ask(pod, "resolve/toy") == service
    until(lambda: set(ask(pod, f"resolve/pods.{namespace}.svc").split()) == addresses, "names of a headless service")


def test_a_container_has_files_of_its_own_and_may_not_change_the_machine(kubernetes, namespace, toy, tmp_path):
    (pod,) = toy(1)
    address = f"{pod['status']['podIP']}:8000"
    assert ask(address, "read/etc/toy/settings/a") == "1"
    assert ask(address, "read/toy/words/word") == "psst"
    assert "WORD=psst" in ask(address, "read/proc/1/environ").split("\0")
    assert ask(address, "read/proc/1/cmdline").split("\0")[:2] == ["python", SERVER]
    assert ask(address, "write/scratch/a") and ask(address, "read/scratch/a") == "something"
    for path in (f"write{tmp_path}/a", "write/etc/a", f"write{SERVER}", f"read{tmp_path}"):
        with pytest.raises(urllib.error.HTTPError):
            ask(address, path)
    (sharing,) = toy(1, {**POD, "shareProcessNamespace": True})
    assert SERVER not in ask(f"{sharing['status']['podIP']}:8000", "read/proc/1/cmdline")


def test_who_ends_or_hangs_is_started_anew_in_the_same_place(kubernetes, namespace, toy):
    (pod,) = toy(1)
    address = f"{pod['status']['podIP']}:8000"
    for restarts, word, code in ((1, "exit", 3), (2, "hang", 0)):
        try:
            ask(address, word)
        except OSError:
            assert word == "exit"
        until(
            lambda restarts=restarts: container(kubernetes, namespace, pod)["restartCount"] == restarts,
            f"a restart after {word}",
        )
        until(lambda: container(kubernetes, namespace, pod)["ready"], "ready again")
        assert container(kubernetes, namespace, pod)["lastState"]["terminated"]["exitCode"] == code
        assert ask(address, "name") == pod["metadata"]["name"]
    previous = kubernetes.kubectl("logs", "-n", namespace, pod["metadata"]["name"], "--previous")
    assert previous.splitlines() == [f"serving as {pod['metadata']['name']}", "asked to end"]


def test_a_pod_that_is_deleted_leaves_its_service_then_ends_in_order(kubernetes, namespace, toy):
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "sleep 1; echo left > /scratch/hook"]}}}
    scratch = {"name": "scratch", "hostPath": {"path": str(kubernetes.folder)}}
    volumes = [*POD["volumes"][:2], scratch]
    (pod,) = toy(1, {**POD, "containers": [{**CONTAINER, "lifecycle": hook}], "volumes": volumes})
    name = pod["metadata"]["name"]
    kubernetes.kubectl("scale", "-n", namespace, "deployment/toy", "--replicas=0")
    slices = ("endpointslices", "-n", namespace, "-l", "kubernetes.io/service-name=toy")
    until(lambda: not kubernetes.get(*slices)["items"][0]["endpoints"], "an empty slice")
    assert "asked to end" not in kubernetes.kubectl("logs", "-n", namespace, name)
    kubernetes.kubectl("wait", "-n", namespace, "--for=delete", f"pod/{name}", f"--timeout={PATIENCE:g}s")
    assert (kubernetes.folder / "hook").read_text() == "left\n"
    assert "asked to end" in kubernetes.log_of(pod, "toy")


def test_a_pod_that_fits_nowhere_waits_and_the_scheduler_says_why(kubernetes, namespace):
    greedy = {**CONTAINER, "resources": {"limits": {"nvidia.com/gpu": 4}}}
    manifest = yaml.safe_dump_all(objects(1, {**POD, "containers": [greedy]}))
    kubernetes.kubectl("apply", "-n", namespace, "-f", "-", given=manifest)

    def reason():
        pods = kubernetes.get("pods", "-n", namespace)["items"]
        conditions = [each for pod in pods for each in pod["status"].get("conditions", ())]
        return next((each["message"] for each in conditions if each.get("reason") == "Unschedulable"), None)

    assert "Insufficient nvidia.com/gpu" in until(reason, "a reason")

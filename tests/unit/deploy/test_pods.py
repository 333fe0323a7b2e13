"""What Kubernetes says of pods and pools, told as every launcher tells it."""

import json

import pytest

from deploy.launchers.base import ProcessKind, Replica, ReplicaState
from deploy.launchers.pods import COMPONENT, View, parse_deployments, parse_pods

DECODE = ProcessKind.DECODE


def metadata(name, component="decode", **more):
    labels = {COMPONENT: component}
    return {"name": name, "uid": f"uid-{name}", "creationTimestamp": "2026-01-01T00:00:00Z", "labels": labels, **more}


def pod(name="decode-a", ready=True, container=None, node="node-1", phase="Running", conditions=(), **more):
    status = {"restartCount": 0, "state": {"running": {}}, "lastState": {}, **(container or {})}
    found = [{"type": "Ready", "status": str(ready)}, *conditions]
    spec = {"nodeName": node} if node else {}
    return {
        "metadata": metadata(name, **more),
        "spec": spec,
        "status": {"phase": phase, "conditions": found, "containerStatuses": [status] if node else []},
    }


def deployment(replicas=1, ready=1, generation=3, observed=3, updated=None, conditions=()):
    counts = {"replicas": replicas, "readyReplicas": ready, "updatedReplicas": replicas if updated is None else updated}
    status = {"observedGeneration": observed, **counts, "conditions": list(conditions)}
    return {
        "metadata": metadata("baton-decode", generation=generation),
        "spec": {"replicas": replicas},
        "status": status,
    }


def view(pods, deployments=()):
    def listed(items):
        return json.dumps({"items": list(items)}).encode()

    return View(parse_deployments(listed(deployments)), parse_pods(listed(pods)))


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available: no GPU"}
ENDED = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
LOOPING = {"restartCount": 2, "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": ENDED}
PULLING = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}


@pytest.mark.parametrize(
    ("told", "state", "instance", "reason"),
    [
        (pod(), ReplicaState.READY, "uid-decode-a/0", ""),
        (pod(container={"restartCount": 2}), ReplicaState.READY, "uid-decode-a/2", ""),
        (pod(ready=False), ReplicaState.STARTING, "uid-decode-a/0", ""),
        (pod(deletionTimestamp="2026-01-01T00:00:09Z"), ReplicaState.DRAINING, "uid-decode-a/0", ""),
        (pod(ready=False, node="", conditions=[UNSCHEDULABLE]), ReplicaState.WAITING, "", UNSCHEDULABLE["message"]),
        (
            pod(ready=False, container=LOOPING),
            ReplicaState.WAITING,
            "",
            "its process ended (exit code 137, OOMKilled); it is started anew",
        ),
        (
            pod(ready=False, container={"state": ENDED}),
            ReplicaState.WAITING,
            "",
            "its process ended (exit code 137, OOMKilled)",
        ),
        (
            pod(ready=False, container=PULLING),
            ReplicaState.STARTING,
            "uid-decode-a/0",
            "ImagePullBackOff: no such image",
        ),
    ],
)
def test_a_pod_is_a_replica_with_the_reason_why_it_is_not_ready(told, state, instance, reason):
    node = told["spec"].get("nodeName", "")
    assert view([told]).replicas == [Replica("decode-a", DECODE, state, instance, node, reason)]


def test_a_pods_record_that_outlives_it_is_nobody():
    assert view([pod(phase="Failed"), pod(phase="Succeeded")]).replicas == []


def test_pods_that_may_not_even_be_made_are_waited_for_with_the_reason():
    quota = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: gpus"}
    (replica,) = view([], [deployment(conditions=[quota])]).replicas
    assert (replica.state, replica.reason) == (ReplicaState.WAITING, "exceeded quota: gpus")


def test_a_pool_is_its_pods_that_stay_oldest_first():
    pods = [
        pod("c", creationTimestamp="2026-01-01T00:00:03Z"),
        pod("b", creationTimestamp="2026-01-01T00:00:01Z"),
        pod("a", creationTimestamp="2026-01-01T00:00:02Z"),
        pod("gone", deletionTimestamp="2026-01-01T00:00:09Z"),
        pod("p", component="prefill"),
    ]
    assert [each.name for each in view(pods).pool(DECODE)] == ["b", "a", "c"]


def test_a_pool_has_its_size_when_all_take_work_and_nobody_else_is_left():
    assert view([pod("a"), pod("b")]).has_size(DECODE, 2)
    assert not view([pod("a"), pod("b", ready=False)]).has_size(DECODE, 2)
    assert not view([pod("a"), pod("b", deletionTimestamp="2026-01-01T00:00:09Z")]).has_size(DECODE, 1)


@pytest.mark.parametrize(
    ("found", "whole"),
    [
        (deployment(), True),
        (deployment(generation=4), False),  # the controller has not seen it yet
        (deployment(updated=0), False),
        (deployment(ready=0), False),
        (deployment(replicas=2, ready=2), False),  # its second pod is not there
    ],
)
def test_a_pool_is_whole_when_its_pods_are_all_there_and_all_new(found, whole):
    assert view([pod()], [found]).is_whole([DECODE]) is whole

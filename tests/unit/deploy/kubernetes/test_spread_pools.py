"""Pools whose workers are on several nodes, for a cluster with LeaderWorkerSet."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from cluster.server_process import worker_parser
from tests.unit.deploy.kubernetes.rendering import MINIMAL, Rendered, topology_of

SPREAD = MINIMAL + "decode: {replicas: 3, tensor_parallel: 8, nodes: 4}\n"
VERSION, KIND = "leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"
HOSTS = "decode-rank-host"
COMPONENT = "app.kubernetes.io/component"


def group_of(rendered: Rendered) -> dict:
    return rendered.all(KIND)["decode"]["spec"]["leaderWorkerTemplate"]


def arguments_of(template: dict):
    """Of a pod with this index in its group."""
    (container,) = template["spec"]["containers"]
    given = [argument.replace("$(LWS_WORKER_INDEX)", "3") for argument in container["args"]]
    return container, worker_parser("worker", "").parse_args(given)


def test_the_pool_is_a_set_of_groups_with_a_pod_for_each_node():
    rendered = Rendered(SPREAD)
    assert set(rendered.all("Deployment")) == {"bootstrap", "prefill", "router"}
    (made,) = rendered.all(KIND).values()
    assert made["apiVersion"] == VERSION and made["spec"]["replicas"] == 3
    assert group_of(rendered)["size"] == 4
    assert group_of(rendered)["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert made["spec"]["startupPolicy"] == "LeaderCreated", "the leader is ready when all are"
    assert "decode" not in rendered.all("Service"), "the controller makes one of that name, and finds leaders by it"


def test_a_groups_pods_run_one_worker_and_find_its_leader(tmp_path):
    rendered = Rendered(SPREAD)
    leader, first = arguments_of(group_of(rendered)["leaderTemplate"])
    host, further = arguments_of(group_of(rendered)["workerTemplate"])
    assert leader["command"] == host["command"] == ["python", "-m", "decode_worker"]
    assert (first.node, first.leader) == (0, None)
    assert further.node == 3
    assert further.leader == f"http://$(LWS_LEADER_ADDRESS):{leader['ports'][0]['containerPort']}"
    assert (further.name, further.host) == ("$(POD_NAME)", "$(POD_IP)")
    assert further.set == first.set and leader["resources"] == host["resources"]
    assert topology_of(rendered, tmp_path, "decode").decode.nodes == 4


def test_who_looks_for_workers_finds_leaders_only_and_who_guards_pods_all_of_them():
    rendered = Rendered(SPREAD)
    labels = [group_of(rendered)[name]["metadata"]["labels"] for name in ("leaderTemplate", "workerTemplate")]
    assert [found[COMPONENT] for found in labels] == ["decode", HOSTS]
    (expression,) = rendered.all("PodDisruptionBudget")["decode"]["spec"]["selector"]["matchExpressions"]
    assert (expression["key"], set(expression["values"])) == (COMPONENT, {"decode", HOSTS})
    policy = rendered.all("NetworkPolicy")["members"]["spec"]
    allowed = policy["ingress"][0]["from"][0]["podSelector"]["matchExpressions"][0]["values"]
    assert HOSTS in allowed and HOSTS in policy["podSelector"]["matchExpressions"][0]["values"]
    assert "prefill-rank-host" not in allowed


@pytest.mark.parametrize(("autoscaler", "kind"), [("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")])
def test_autoscalers_count_its_groups(autoscaler, kind):
    rendered = Rendered(SPREAD, f"autoscaling: {{kind: {autoscaler}}}")
    targets = {name: made["spec"]["scaleTargetRef"] for name, made in rendered.all(kind).items()}
    assert targets["decode"] == {"apiVersion": VERSION, "kind": KIND, "name": "baton-decode"}
    assert targets["prefill"]["kind"] == "Deployment"
    assert "replicas" not in rendered.all(KIND)["decode"]["spec"]


def test_a_pod_has_a_gpu_for_each_rank_that_runs_there():
    gpus = "decode: {{resources: {{limits: {{nvidia.com/gpu: {}}}}}}}"
    assert Rendered(SPREAD, gpus.format(2)).all(KIND)
    with pytest.raises(ConfigError, match=r"nvidia.com/gpu is 8, and a pod of the topology's decode wants 2"):
        Rendered(SPREAD, gpus.format(8))

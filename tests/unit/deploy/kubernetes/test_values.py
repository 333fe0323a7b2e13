"""Values of the chart: what they may be, and how those of a user go over the chart's own."""

import json

import pytest
import yaml

from cluster.errors import ConfigError
from deploy.kubernetes.chart import CHART, merge
from deploy.kubernetes.values import schema
from tests.unit.deploy.kubernetes.rendering import MINIMAL, Rendered


def test_helm_refuses_by_the_same_rules():
    assert json.loads((CHART / "values.schema.json").read_text()) == json.loads(schema()), "run make docs"


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ("prefil: {}", r"values:1: prefil: unknown key; did you mean prefill\?"),
        ("\nrouter: {replicas: 0}", "values:2: router.replicas: expected a whole number of at least 1, found 0"),
        ("decode: {port: 99999}", "decode.port: expected a whole number from 1 to 65535"),
        ("autoscaling: {kind: knative}", "autoscaling.kind: expected one of none, hpa, keda, external"),
        ("image: {digest: latest}", "image.digest"),
        ("secrets: {cluster: {existingSecret: My_Secret}}", "secrets.cluster.existingSecret"),
        ("podDisruptionBudget: {maxUnavailable: half}", "podDisruptionBudget.maxUnavailable"),
        ("[]", "values:1: topology: expected"),
    ],
)
def test_wrong_values_are_refused_with_their_place(values, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Rendered(values=values)


def test_mappings_are_merged_and_all_else_is_replaced():
    under = {"a": {"b": 1, "c": [1, 2], "d": 4}, "e": 5}
    assert merge(under, {"a": {"c": [3], "d": None}}) == {"a": {"b": 1, "c": [3]}, "e": 5}
    assert under["a"]["c"] == [1, 2], "the chart's own stay as they are"


def test_gpus_and_rdma_devices_are_asked_for_and_reach_the_pods():
    values = yaml.safe_dump(
        {
            "decode": {
                "resources": {"limits": {"nvidia.com/gpu": 2, "rdma/hca_shared_devices_a": 1, "memory": "64Gi"}},
                "nodeSelector": {"pool": "h200"},
                "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
                "sharedMemory": "16Gi",
                "ipcLock": True,
                "runtimeClassName": "nvidia",
            },
            "model": {"volume": {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}},
        }
    )
    rendered = Rendered(MINIMAL + "decode: {tensor_parallel: 2}", values)
    decode, container = rendered.pods()["decode"], rendered.container("decode")
    wanted = {"cpu": "2", "memory": "64Gi", "nvidia.com/gpu": 2, "rdma/hca_shared_devices_a": 1}
    assert container["resources"]["limits"] == wanted, "over the chart's own, key by key"
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert (decode["nodeSelector"], decode["runtimeClassName"]) == ({"pool": "h200"}, "nvidia")
    assert decode["tolerations"][0]["key"] == "nvidia.com/gpu"
    shared = next(volume for volume in decode["volumes"] if volume["name"] == "shared-memory")
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    with_model = [
        name
        for name in rendered.pods()
        if "model" in {mount["name"] for mount in rendered.container(name)["volumeMounts"]}
    ]
    assert sorted(with_model) == ["decode", "prefill", "router"]
    assert "nodeSelector" not in rendered.pods()["prefill"]

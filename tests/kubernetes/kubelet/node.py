"""One node as the API server sees it: what it has, and that it is alive."""

from __future__ import annotations

import asyncio
from datetime import datetime, timezone
from typing import NamedTuple

from tests.kubernetes.kubelet.api import Api, ApiError, Json

LEASE_SECONDS = 40
RENEW_SECONDS = 5.0
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"


class NodeSpec(NamedTuple):
    """A node and its capacities: {"cpu": "8", "memory": "16Gi", "pods": "50", "nvidia.com/gpu": "2"}."""

    name: str
    capacity: dict[str, str]
    labels: dict[str, str]


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


async def register(api: Api, node: NodeSpec, address: str, port: int) -> None:
    """Makes the node known, and ready. `address` and `port`: where its agent serves logs."""
    labels = {"kubernetes.io/hostname": node.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
    body: Json = {"kind": "Node", "apiVersion": "v1", "metadata": {"name": node.name, "labels": labels | node.labels}}
    await api.create("/api/v1/nodes", body)
    condition = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now()}
    status = {
        "capacity": node.capacity,
        "allocatable": node.capacity,
        "conditions": [condition],
        "addresses": [{"type": "InternalIP", "address": address}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
    }
    await api.patch(f"/api/v1/nodes/{node.name}/status", {"status": status})


async def renew_lease(api: Api, node: NodeSpec) -> None:
    """For ever: without it, the node's pods are moved elsewhere."""
    name = {"name": node.name, "namespace": "kube-node-lease"}
    while True:
        renewed = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": node.name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": renewed}
        body: Json = {"kind": "Lease", "apiVersion": "coordination.k8s.io/v1", "metadata": name, "spec": spec}
        try:
            await api.patch(f"{_LEASES}/{node.name}", {"spec": spec})
        except ApiError as error:
            if error.status != 404:
                raise
            await api.create(_LEASES, body)
        await asyncio.sleep(RENEW_SECONDS)

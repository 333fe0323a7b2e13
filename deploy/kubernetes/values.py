"""The form of the chart's values: what may stand in values.yaml, from which Helm's values.schema.json is made.

`python -m deploy.kubernetes.values` prints the schema (`make docs` writes it). What each value means stands beside its
default, in chart/values.yaml.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Union

import msgspec
from msgspec import Meta

from cluster.section import NonNegative, Positive, Seconds, Section

Name = Annotated[str, Meta(pattern="^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", max_length=253)]
"""Of a Kubernetes object; may be empty."""
SecretKeyName = Annotated[str, Meta(pattern="^[-._a-zA-Z0-9]+$")]
Quantity = Union[str, int]
"""As Kubernetes writes amounts: 8, 250m, 64Gi."""
ListenPort = Annotated[int, Meta(ge=1, le=65535)]
FreeForm = dict[str, Any]
"""Passed on to Kubernetes as it is."""
FreeForms = list[FreeForm]
CountOrPercent = Union[NonNegative, Annotated[str, Meta(pattern="^[0-9]+%$")]]


class Form(Section, frozen=True, kw_only=True, rename="camel"):
    """A section of them."""


class PullPolicy(str, Enum):
    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class ServiceType(str, Enum):
    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"


class Autoscaler(str, Enum):
    NONE = "none"
    HPA = "hpa"
    KEDA = "keda"
    EXTERNAL = "external"


class Image(Form, frozen=True, kw_only=True):
    repository: Annotated[str, Meta(min_length=1)]
    tag: str
    digest: Annotated[str, Meta(pattern="^(sha256:[0-9a-f]{64})?$")]
    pull_policy: PullPolicy
    pull_secrets: FreeForms


class SecretKey(Form, frozen=True, kw_only=True):
    existing_secret: Name
    key: SecretKeyName


class ApiKeys(Form, frozen=True, kw_only=True):
    existing_secret: Name
    key: SecretKeyName
    open: bool


class ExistingSecret(Form, frozen=True, kw_only=True):
    existing_secret: Name


class Secrets(Form, frozen=True, kw_only=True):
    cluster: SecretKey
    api_keys: ApiKeys
    tls: ExistingSecret


class ModelVolume(Form, frozen=True, kw_only=True):
    mount_path: Annotated[str, Meta(pattern="^/")]
    volume: FreeForm


class Pods(Form, frozen=True, kw_only=True):
    labels: dict[str, str]
    annotations: dict[str, str]
    run_as_user: Positive
    fs_group: Positive
    priority_class_name: Name
    extra_env: FreeForms


class Resources(Form, frozen=True, kw_only=True):
    requests: dict[str, Quantity] = {}
    limits: dict[str, Quantity] = {}


class RollingUpdate(Form, frozen=True, kw_only=True):
    max_surge: CountOrPercent
    max_unavailable: CountOrPercent


class Strategy(Form, frozen=True, kw_only=True):
    rolling_update: RollingUpdate


class Scheduled(Form, frozen=True, kw_only=True):
    """What all of our pods are told alike."""

    resources: Resources
    node_selector: dict[str, str]
    tolerations: FreeForms
    affinity: FreeForm
    extra_env: FreeForms


class Pool(Scheduled, frozen=True, kw_only=True):
    port: ListenPort
    strategy: Strategy
    startup_seconds: Annotated[int, Meta(ge=2)]
    shared_memory: Quantity
    scratch: Quantity
    ipc_lock: bool
    host_network: bool
    runtime_class_name: Name
    topology_spread_constraints: FreeForms


class RouterService(Form, frozen=True, kw_only=True):
    type: ServiceType
    port: ListenPort
    annotations: dict[str, str]


class Routers(Scheduled, frozen=True, kw_only=True):
    replicas: Positive
    pre_stop_seconds: NonNegative
    service: RouterService
    topology_spread_constraints: FreeForms


class BootstrapPod(Scheduled, frozen=True, kw_only=True):
    host: str


class ServiceAccount(Form, frozen=True, kw_only=True):
    create: bool
    name: Name
    annotations: dict[str, str]


class PodDisruptionBudget(Form, frozen=True, kw_only=True):
    enabled: bool
    max_unavailable: CountOrPercent


class NetworkPolicy(Form, frozen=True, kw_only=True):
    enabled: bool
    clients: FreeForms
    monitoring: FreeForms


class PrefillScaling(Form, frozen=True, kw_only=True):
    min_replicas: Positive
    max_replicas: Positive
    ttft_budget_seconds: Seconds
    tokens_per_second: Positive


class DecodeScaling(Form, frozen=True, kw_only=True):
    min_replicas: Positive
    max_replicas: Positive
    committed_pages: Annotated[float, Meta(gt=0, le=1)]


class Keda(Form, frozen=True, kw_only=True):
    prometheus_address: Annotated[str, Meta(pattern="^https?://")]


class Autoscaling(Form, frozen=True, kw_only=True):
    kind: Autoscaler
    prefill: PrefillScaling
    decode: DecodeScaling
    scale_down_seconds: Annotated[int, Meta(ge=0, le=3600)]
    keda: Keda


class PodMonitor(Form, frozen=True, kw_only=True):
    enabled: bool
    interval: Annotated[str, Meta(pattern="^[0-9]+(ms|s|m)$")]
    labels: dict[str, str]
    tls_config: FreeForm


class Values(Form, frozen=True, kw_only=True):
    """All of them: the defaults are those of chart/values.yaml."""

    topology: Union[str, FreeForm, None] = None
    name_override: Name
    fullname_override: Name
    image: Image
    listen_address: Annotated[str, Meta(min_length=1)]
    secrets: Secrets
    model: ModelVolume
    pods: Pods
    prefill: Pool
    decode: Pool
    router: Routers
    bootstrap: BootstrapPod
    service_account: ServiceAccount
    pod_disruption_budget: PodDisruptionBudget
    network_policy: NetworkPolicy
    autoscaling: Autoscaling
    pod_monitor: PodMonitor
    globals: FreeForm = msgspec.field(default={}, name="global")
    """Helm's own, for charts of charts."""


def schema() -> str:
    """Of the values, as JSON Schema."""
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Values)}
    return msgspec.json.format(msgspec.json.encode(described), indent=2).decode()


if __name__ == "__main__":
    print(schema())

"""The form of a LeaderWorkerSet, as the reference of its API has it (leaderworkerset.x-k8s.io/v1), and nothing else.
Its definition comes by no registry that the tests can fetch from. Pods' templates are Kubernetes' own, and are checked
as such."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0)]
CountOrPercent = Union[Count, Annotated[str, Meta(pattern="^[0-9]+%$")]]


class Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    pass


class RollingUpdateConfiguration(Form, frozen=True):
    partition: Count = 0
    max_unavailable: CountOrPercent = 1
    max_surge: CountOrPercent = 0


class RolloutStrategy(Form, frozen=True):
    type: Literal["RollingUpdate"]
    rolling_update_configuration: RollingUpdateConfiguration = RollingUpdateConfiguration()


class LeaderWorkerTemplate(Form, frozen=True):
    worker_template: dict[str, Any]
    leader_template: dict[str, Any] | None = None
    size: Annotated[int, Meta(ge=1)] = 1
    restart_policy: Literal["RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"] = "None"
    sub_group_policy: dict[str, Any] | None = None


class NetworkConfig(Form, frozen=True):
    subdomain_policy: Literal["Shared", "UniquePerReplica"]


class Spec(Form, frozen=True):
    leader_worker_template: LeaderWorkerTemplate
    replicas: Count = 1
    rollout_strategy: RolloutStrategy | None = None
    startup_policy: Literal["LeaderCreated", "LeaderReady"] = "LeaderCreated"
    network_config: NetworkConfig | None = None


class LeaderWorkerSet(Form, frozen=True):
    api_version: Literal["leaderworkerset.x-k8s.io/v1"]
    kind: Literal["LeaderWorkerSet"]
    metadata: dict[str, Any]
    spec: Spec

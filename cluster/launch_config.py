"""The settings of the places where a cluster can run: what only Ray, or only Kubernetes, must know."""

from __future__ import annotations

from typing import Any

from cluster.section import Amount, Section, Text


class RayPool(Section, frozen=True):
    """What each worker of a pool reserves of the node that Ray finds for it, for each of its ranks."""

    cpus: Amount = 1.0
    """Kept free of Ray's other work. Which cores they are, `cpus` of the pool's own section says."""
    gpus: Amount = 0.0
    """A worker sees those that it has reserved, and no others."""
    resources: dict[Text, Amount] = {}
    """Further ones, by the names that `ray start --resources` gave to nodes: {prefill: 1}."""


class Ray(Section, frozen=True):
    """With `launch: ray`. Baton must be installed on each node, or come with `runtime_env`.

    ray: {address: auto, decode: {gpus: 1, resources: {decode: 1}}}
    """

    address: Text = "auto"
    """Of the head's GCS, HOST:PORT. auto: the Ray cluster that this machine belongs to."""
    runtime_env: dict[Text, Any] = {}
    """What Ray prepares for the workers on each node, as `ray.init` takes it: {pip: [...], env_vars: {...}}."""
    prefill: RayPool = RayPool()
    decode: RayPool = RayPool()


class Kubernetes(Section, frozen=True):
    """With `launch: kubernetes`, and for `baton kubernetes`.

    kubernetes: {namespace: inference, values_file: my-values.yaml}
    """

    context: Text | None = None
    """Of kubectl's configuration: which Kubernetes, as whom; by default its current one."""
    namespace: Text = "default"
    release: Text = "baton"
    """What the names of the objects begin with."""
    values_file: Text | None = None
    """What only Kubernetes asks: images, resources, nodes, volumes. Values of the chart in deploy/kubernetes/chart."""

"""`baton up` of a cluster that outlives it: where the place supervises processes itself."""

from __future__ import annotations

from rich.console import Console

from cluster.clock import MonotonicClock
from cluster.config import Topology
from deploy.launchers.kubernetes import KubernetesLauncher, render


async def bring_up(topology: Topology, start_timeout: float, console: Console) -> None:
    """Returns when the cluster can serve. Raises `ConfigError` and `LaunchError`; what was begun by then goes on."""

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    config = topology.kubernetes
    objects = render(topology)
    await KubernetesLauncher(topology, objects, MonotonicClock(), tell).start(start_timeout)
    services = (made for made in objects if made["kind"] == "Service")
    (router,) = (made for made in services if made["metadata"]["name"].endswith("-router"))
    port = router["spec"]["ports"][0]["port"]
    scheme = topology.router.tls.scheme
    address = f"{scheme}://{router['metadata']['name']}.{config.namespace}.svc:{port}"
    tell(
        f"ready: {topology.served_model} at {address}, inside of Kubernetes (`baton down` with this topology stops it)"
    )

"""The chart's objects, and ways to find one's way in them."""

from __future__ import annotations

from pathlib import Path

from cluster.config import Topology
from cluster.topology import load_topology
from deploy.kubernetes.chart import Chart, Release

REPOSITORY = Path(__file__).parents[4]
TOPOLOGIES = sorted((REPOSITORY / "deploy" / "topologies").glob("*.yaml"))
POOLS = ("prefill", "decode")
RELEASE = Release("baton", "inference")
CHART = Chart()
MINIMAL = "model: {path: /models/m}\n"


class Rendered:
    """By kind and by name, without the name of the release."""

    def __init__(self, topology=MINIMAL, values: str = "", release: Release = RELEASE) -> None:
        self.objects = CHART.render(topology, values, "values", release)

    def all(self, kind: str) -> dict:
        made = {one["metadata"]["name"].removeprefix("baton-"): one for one in self.objects if one["kind"] == kind}
        assert len(made) == len([one for one in self.objects if one["kind"] == kind]), "two of one name"
        return made

    def templates(self) -> dict:
        """Of all pods but rank hosts, by component."""
        plain = {name: made["spec"]["template"] for name, made in self.all("Deployment").items()}
        groups = {name: made["spec"]["leaderWorkerTemplate"] for name, made in self.all("LeaderWorkerSet").items()}
        return plain | {name: group["leaderTemplate"] for name, group in groups.items()}

    def pods(self) -> dict:
        """Their specs."""
        return {name: template["spec"] for name, template in self.templates().items()}

    def container(self, component: str) -> dict:
        (container,) = self.pods()[component]["containers"]
        return container

    def settings(self, component: str) -> dict[str, str]:
        """What a component's processes set over the topology."""
        given = [one.removeprefix("--set=") for one in self.container(component)["args"] if one.startswith("--set=")]
        return dict(one.split("=", 1) for one in given)


def topology_of(rendered: Rendered, folder: Path, component: str) -> Topology:
    """The topology as the processes of that component read it, from the ConfigMap and with their `--set`."""
    file = folder / "topology.yaml"
    file.write_text(rendered.all("ConfigMap")["topology"]["data"]["topology.yaml"])
    return load_topology(file, [f"{key}={value}" for key, value in rendered.settings(component).items()])

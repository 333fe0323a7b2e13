"""`baton kubernetes`: a topology as Kubernetes objects, for those without Helm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.topology import dump_topology, load_topology
from deploy.kubernetes.chart import Chart, Release, read_values
from deploy.kubernetes.templating.yaml_text import written_all

app = typer.Typer(help="A topology on Kubernetes.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A topology on Kubernetes."""


@app.command()
def render(
    topology_path: Annotated[Path, typer.Argument(metavar="TOPOLOGY", help="The cluster's YAML file.")],
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the topology.")
    ] = [],  # noqa: B006
    values_path: Annotated[
        Path | None, typer.Option("--values", metavar="FILE", help="Values of the chart: images, resources, volumes.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the objects' names begin with.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Where they belong.")] = None,
    with_secrets: Annotated[bool, typer.Option("--secrets/--no-secrets", help="Those that are made here.")] = True,
) -> None:
    """Print the objects that `helm install` would make, for `kubectl apply -f -`."""
    topology = load_topology(topology_path, overrides)
    config = topology.kubernetes
    if values_path is None and config.values_file is not None:
        values_path = Path(config.values_file)
    # As it was written, with its comments, unless something was changed.
    text = dump_topology(topology) if overrides else topology_path.read_text(encoding="utf-8")
    values, origin = read_values(values_path)
    objects = Chart().render(text, values, origin, Release(name or config.release, namespace or config.namespace))
    if not with_secrets:
        objects = [made for made in objects if made["kind"] != "Secret"]
    elif any(made["kind"] == "Secret" for made in objects):
        print(
            "note: its Secrets are new each time: from the second time on, --no-secrets keeps those that are there",
            file=sys.stderr,
        )
    print(written_all(objects), end="")

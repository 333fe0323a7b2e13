"""The `baton` command. Exit codes: 0 done, or stopped as asked; 1 the cluster failed; 2 a setting is wrong."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from cluster.config import Dtype, KVDtype, LauncherName, Router, Security, Topology
from cluster.errors import BatonError, ConfigError
from cluster.model_files import resolve_model
from cluster.tasks import first_of
from cluster.topology import dump_topology, load_topology
from deploy.cluster_client import RouterClient, ask_router, base_url
from deploy.demo import run_demo
from deploy.detached import bring_up
from deploy.explain import waterfall
from deploy.foreground import run_cluster
from deploy.gpus import deal_gpus, visible_gpus
from deploy.kubernetes.cli import app as kubernetes
from deploy.launchers.base import Cluster
from deploy.memory import Wanted as MemoryWanted
from deploy.memory import ask_engine, parse_size
from deploy.memory import requests as memory_requests
from deploy.memory import show as show_plan
from deploy.operate import find_topology, open_cluster
from deploy.pools import parse_sizes
from deploy.session import Session
from deploy.show import Wanted, show_logs, show_status

TopologyPath = Annotated[Path, typer.Argument(metavar="TOPOLOGY", help="The cluster's YAML file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set router.port=9000.")
]
LogDirectory = Annotated[Path | None, typer.Option("--log-dir", help="Where the logs go; default: a new folder.")]
StartTimeout = Annotated[float, typer.Option("--start-timeout", metavar="SECONDS", help="Limit of the start-up.")]

ClusterTopology = Annotated[
    Path | None,
    typer.Option("--topology", help="The cluster's YAML file; default: the cluster with bootstrap's usual port."),
]
RollingTimeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Limit for each worker.")]

STOP_SECONDS = 60.0
"""For each of router, workers and bootstrap, where the place does not know better."""

app = typer.Typer(
    help="Prefill/decode disaggregated LLM serving.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(kubernetes, name="kubernetes")


def main() -> None:
    try:
        app()
    except ConfigError as error:
        _fail(error, 2)
    except BatonError as error:
        _fail(error, 1)


@app.command()
def up(
    topology_path: TopologyPath,
    overrides: Overrides = [],  # noqa: B006
    log_directory: LogDirectory = None,
    start_timeout: StartTimeout = 900.0,
) -> None:
    """Start a cluster in the foreground, where Ctrl-C stops it; on Kubernetes it runs on."""
    topology = load_topology(topology_path, overrides)
    console = _console()
    if topology.launch is LauncherName.KUBERNETES:
        _interruptible(bring_up(topology, start_timeout, console))
        return

    async def serve(topology: Topology, session: Session, router: RouterClient) -> None:
        url = base_url(topology.router.host, topology.router.port, topology.router.tls.scheme)
        console.print(
            f"ready: {topology.served_model} at {url} (Ctrl-C stops it)", markup=False, highlight=False, soft_wrap=True
        )
        await session.watch()

    asyncio.run(run_cluster(topology, log_directory, start_timeout, console, serve))


@app.command()
def demo(
    topology_path: TopologyPath,
    overrides: Overrides = [],  # noqa: B006
    log_directory: LogDirectory = None,
    start_timeout: StartTimeout = 900.0,
) -> None:
    """Start a cluster, stream one answer, show where its time went, stop."""
    topology = load_topology(topology_path, overrides)
    console = _console()

    async def serve(topology: Topology, session: Session, router: RouterClient) -> None:
        answering = asyncio.ensure_future(run_demo(router, topology.served_model, console))
        watching = asyncio.ensure_future(session.watch())
        await first_of(answering, watching)

    asyncio.run(run_cluster(topology, log_directory, start_timeout, console, serve))


@app.command()
def status(
    topology_path: ClusterTopology = None,
    url: Annotated[str | None, typer.Option(help="Bootstrap's URL, in place of a topology.")] = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Again every second, until Ctrl-C.")] = False,
) -> None:
    """Show the workers of a running cluster."""
    wanted = Wanted(topology_path, overrides, url)
    _interruptible(show_status(wanted, _console(), as_json=as_json, watch=watch))


@app.command()
def scale(
    sizes: Annotated[list[str], typer.Argument(metavar="POOL=WORKERS...", help="decode=4, prefill=2, or both.")],
    topology_path: ClusterTopology = None,
    overrides: Overrides = [],  # noqa: B006
    timeout: RollingTimeout = 900.0,
) -> None:
    """Make pools larger or smaller while they serve: new workers take work when ready, the youngest drain and end."""
    wanted = parse_sizes(sizes)
    _operate(topology_path, overrides, timeout, lambda cluster: cluster.scale(wanted))


@app.command()
def drain(
    workers: Annotated[list[str], typer.Argument(metavar="WORKER...", help="Names, as `baton status` shows them.")],
    topology_path: ClusterTopology = None,
    overrides: Overrides = [],  # noqa: B006
    timeout: RollingTimeout = 900.0,
) -> None:
    """End workers in order: no new work, what they have finishes, or goes on elsewhere."""
    _operate(topology_path, overrides, timeout, lambda cluster: cluster.drain(workers))


@app.command()
def restart(
    workers: Annotated[list[str] | None, typer.Argument(metavar="[WORKER...]", help="Default: all of them.")] = None,
    topology_path: ClusterTopology = None,
    overrides: Overrides = [],  # noqa: B006
    timeout: RollingTimeout = 900.0,
) -> None:
    """Drain workers and start them anew, the next when the last one takes work again."""
    _operate(topology_path, overrides, timeout, lambda cluster: cluster.restart(workers or []))


@app.command()
def down(topology_path: ClusterTopology = None, overrides: Overrides = []) -> None:  # noqa: B006
    """Stop a running cluster, as Ctrl-C of its `baton up` would."""
    _operate(topology_path, overrides, 0.0, lambda cluster: cluster.stop(STOP_SECONDS))


@app.command()
def logs(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A worker, router or bootstrap.")],
    topology_path: ClusterTopology = None,
    overrides: Overrides = [],  # noqa: B006
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="The last of them.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="All that come, until Ctrl-C.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="As they are written, JSON.")] = False,
) -> None:
    """Show the log of one process of a running cluster, wherever it runs."""
    _interruptible(show_logs(Wanted(topology_path, overrides), name, lines, follow=follow, raw=raw))


@app.command()
def explain(
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="The answer's id, or the request's X-Request-Id.")],
    router: Annotated[str | None, typer.Option(metavar="URL", help="Of the router, in place of a topology.")] = None,
    topology_path: ClusterTopology = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Show where the time of one request went, stage by stage."""

    async def ask() -> None:
        topology = await find_topology(topology_path, overrides)
        config = topology.router if topology else Router()
        async with ask_router(config, topology.security if topology else Security(), router) as client:
            record = await client.record(request)
        if as_json:
            print(msgspec.json.encode(record).decode())
            return
        _console().print(waterfall(record))
        if record.total_seconds is None:
            print("it is still under way: the workers tell their part at its end")

    asyncio.run(ask())


@app.command()
def validate(topology_path: TopologyPath, overrides: Overrides = []) -> None:  # noqa: B006
    """Check a topology without starting anything, and print it with all defaults."""
    topology = load_topology(topology_path, overrides)
    print(dump_topology(topology), end="")
    try:
        resolve_model(topology.model.path)
        if topology.launch is LauncherName.LOCAL:
            deal_gpus(topology, visible_gpus(os.environ))
    except ConfigError as error:
        # No reason to fail: the cluster may run elsewhere.
        print(f"note: not on this machine: {error}", file=sys.stderr)


@app.command()
def plan_memory(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Default: the topology's.")] = None,
    topology_path: Annotated[
        Path | None, typer.Option("--topology", help="Plan a worker of each of its pools.")
    ] = None,
    overrides: Overrides = [],  # noqa: B006
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of one GPU: 80GiB. Default: on a CPU.")
    ] = None,
    tensor_parallel: Annotated[int | None, typer.Option(min=1, help="Ranks that share each layer.")] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(min=1, help="Stages that share the layers.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a request; default: the model's limit.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at a time; default: 1.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of weights and activations.")] = None,
    kv_dtype: Annotated[KVDtype | None, typer.Option(help="Of the KV cache; default: the same.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compute a model's need of memory, without loading it."""
    topology = load_topology(topology_path, overrides) if topology_path else None
    gpu_bytes = parse_size(gpu_memory) if gpu_memory else None
    wanted = MemoryWanted(tensor_parallel, pipeline_parallel, context, concurrency, dtype, kv_dtype, gpu_bytes)
    plans = ask_engine(memory_requests(model, topology, wanted))
    if as_json:
        print(msgspec.json.encode(plans).decode())
        return
    for plan in plans:
        show_plan(plan, _console())


def _operate(
    topology_path: Path | None, overrides: list[str], timeout: float, work: Callable[[Cluster], Awaitable[None]]
) -> None:
    async def operate() -> None:
        topology = await find_topology(topology_path, overrides)
        async with open_cluster(topology, lambda line: print(line, flush=True), timeout) as cluster:
            await work(cluster)

    _interruptible(operate())


def _interruptible(work: Coroutine[Any, Any, None]) -> None:
    """Ctrl-C ends what is watched, followed or waited for, and is no error."""
    with suppress(KeyboardInterrupt):
        asyncio.run(work)


def _console() -> Console:
    """Standard output; wide where there is no terminal to say how wide."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _fail(error: BatonError, code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()

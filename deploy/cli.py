"""The `baton` command. Exit codes: 0 done, or stopped as asked; 1 the cluster failed; 2 a setting is wrong."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from cluster.clock import MonotonicClock
from cluster.config import Bootstrap, Router, Security
from cluster.errors import BatonError, ConfigError
from cluster.model_files import resolve_model
from cluster.tasks import first_of
from cluster.topology import dump_topology, load_topology
from deploy.cluster_client import RouterClient, ask_bootstrap, ask_router, base_url
from deploy.demo import run_demo
from deploy.explain import waterfall
from deploy.foreground import run_cluster
from deploy.kubernetes.cli import app as kubernetes
from deploy.preflight import prepare
from deploy.rolling import Rolling
from deploy.session import Session
from deploy.status import status_table

TopologyPath = Annotated[Path, typer.Argument(metavar="TOPOLOGY", help="The cluster's YAML file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set router.port=9000.")
]
LogDirectory = Annotated[Path | None, typer.Option("--log-dir", help="Where the logs go; default: a new folder.")]
StartTimeout = Annotated[float, typer.Option("--start-timeout", metavar="SECONDS", help="Limit of the start-up.")]

ClusterTopology = Annotated[
    Path | None,
    typer.Option("--topology", help="The cluster's YAML file; for one of `baton up`, that in its log folder."),
]
RollingTimeout = Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Limit for each worker.")]

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
    """Start a cluster in the foreground; Ctrl-C stops it."""
    topology = prepare(load_topology(topology_path, overrides))
    console = _console()

    async def serve(session: Session, router: RouterClient) -> None:
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
    topology = prepare(load_topology(topology_path, overrides))
    console = _console()

    async def serve(session: Session, router: RouterClient) -> None:
        answering = asyncio.ensure_future(run_demo(router, topology.served_model, console))
        watching = asyncio.ensure_future(session.watch())
        await first_of(answering, watching)

    asyncio.run(run_cluster(topology, log_directory, start_timeout, console, serve))


@app.command()
def status(
    topology_path: Annotated[Path | None, typer.Option("--topology", help="The cluster's YAML file.")] = None,
    url: Annotated[str | None, typer.Option(help="Bootstrap's URL, in place of a topology.")] = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the workers of a running cluster."""
    topology = load_topology(topology_path, overrides) if topology_path else None
    config = topology.bootstrap if topology else Bootstrap()

    async def ask() -> None:
        async with ask_bootstrap(config, topology.security if topology else Security(), url) as bootstrap:
            workers = await bootstrap.workers()
        if as_json:
            print(msgspec.json.encode(workers).decode())
        elif workers:
            _console().print(status_table(workers, config.lease_seconds))
        else:
            print("no workers")

    asyncio.run(ask())


@app.command()
def drain(
    workers: Annotated[list[str], typer.Argument(metavar="WORKER...", help="Names, as `baton status` shows them.")],
    topology_path: ClusterTopology = None,
    overrides: Overrides = [],  # noqa: B006
    timeout: RollingTimeout = 900.0,
) -> None:
    """End workers in order: no new work, what they have finishes, or goes on elsewhere."""
    _roll(topology_path, overrides, timeout, lambda rolling: rolling.drain(workers))


@app.command()
def restart(
    workers: Annotated[list[str] | None, typer.Argument(metavar="[WORKER...]", help="Default: all of them.")] = None,
    topology_path: ClusterTopology = None,
    overrides: Overrides = [],  # noqa: B006
    timeout: RollingTimeout = 900.0,
) -> None:
    """Drain workers and start them anew, the next when the last one takes work again."""
    _roll(topology_path, overrides, timeout, lambda rolling: rolling.restart(workers or []))


@app.command()
def explain(
    request: Annotated[str, typer.Argument(metavar="REQUEST", help="The answer's id, or the request's X-Request-Id.")],
    router: Annotated[str | None, typer.Option(metavar="URL", help="Of the router, in place of a topology.")] = None,
    topology_path: Annotated[Path | None, typer.Option("--topology", help="The cluster's YAML file.")] = None,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Show where the time of one request went, stage by stage."""
    topology = load_topology(topology_path, overrides) if topology_path else None
    config = topology.router if topology else Router()

    async def ask() -> None:
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
    except ConfigError as error:
        # No reason to fail: the cluster may run elsewhere.
        print(f"note: not on this machine: {error}", file=sys.stderr)


def _roll(
    topology_path: Path | None, overrides: list[str], timeout: float, work: Callable[[Rolling], Awaitable[None]]
) -> None:
    topology = load_topology(topology_path, overrides) if topology_path else None
    security = topology.security if topology else Security()

    async def roll() -> None:
        async with (
            ask_bootstrap(topology.bootstrap if topology else Bootstrap(), security) as bootstrap,
            ask_router(topology.router if topology else Router(), security) as router,
        ):
            await work(Rolling(bootstrap, router, MonotonicClock(), timeout, lambda line: print(line, flush=True)))

    asyncio.run(roll())


def _console() -> Console:
    """Standard output; wide where there is no terminal to say how wide."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _fail(error: BatonError, code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()

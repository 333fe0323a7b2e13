"""Starting a worker on one of its hosts: the control process on the first, a rank host on each further one.

python -m prefill_worker --topology cluster.yaml --host 10.0.0.1 --port 8100
python -m prefill_worker --topology cluster.yaml --host 10.0.0.2 --node 1 --leader http://10.0.0.1:8100
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from cluster.config import Topology
from cluster.errors import ConfigError
from cluster.messages import Role
from cluster.rank_host import make_rank_host, serve_ranks
from cluster.rank_process import engine_command
from cluster.server_process import run, worker_parser
from cluster.worker_shell import EngineCommand


class Serve(Protocol):
    """A role's control process, see `prefill_worker.control.serve`."""

    async def __call__(
        self, topology: Topology, name: str, host: str, port: int, command: EngineCommand, *, listen: str | None = None
    ) -> int: ...


def worker_main(role: Role, serve: Serve, environment: Callable[[Topology], Mapping[str, str]]) -> int:
    """Runs the process to its end and returns its exit status. `environment`: of its engine processes."""
    program = f"{role.value}_worker"
    arguments = worker_parser(program, f"One worker of the {role.value} pool.").parse_args()
    name = arguments.name or f"{role.value}-{arguments.index}"
    engine = ["--topology", arguments.topology, "--index", str(arguments.index), "--name", name]
    for override in arguments.set:
        engine += ["--set", override]

    async def start(topology: Topology) -> int:
        section = topology.prefill if role is Role.PREFILL else topology.decode
        host = arguments.host or section.host
        command = EngineCommand(
            f"{program}.engine_process", [*engine, "--host", host], environment(topology), section.grid.ranks
        )
        if arguments.node == 0:
            return await serve(topology, name, host, arguments.port, command, listen=arguments.listen)
        if not 0 < arguments.node < section.nodes or arguments.leader is None:
            raise ConfigError(f"--node {arguments.node} needs --leader, and {role.value}.nodes above it")
        ranks = make_rank_host(
            topology,
            arguments.leader,
            arguments.node,
            engine_command(command.module, command.arguments),
            command.environment,
        )
        return await serve_ranks(topology, ranks, arguments.listen or host, arguments.port)

    process = name if arguments.node == 0 else f"{name}.{arguments.node}"
    return run(process, arguments.topology, arguments.set, start)

"""`python -m prefill_worker --topology FILE --index N`: the control process of one prefill worker."""

from __future__ import annotations

import sys

from cluster.config import Topology
from cluster.server_process import run, worker_parser
from cluster.worker_shell import EngineCommand
from engine.environment import engine_environment
from kv_transfer.backends import backend_environment
from prefill_worker.control import serve


def main() -> int:
    arguments = worker_parser("prefill_worker", "One worker of the prefill pool.").parse_args()
    name = arguments.name or f"prefill-{arguments.index}"
    engine = ["--topology", arguments.topology, "--index", str(arguments.index), "--name", name]
    for override in arguments.set:
        engine += ["--set", override]

    async def start(topology: Topology) -> int:
        host = arguments.host or topology.prefill.host
        environment = engine_environment() | backend_environment(topology.kv.transfer)
        command = EngineCommand(
            "prefill_worker.engine_process", [*engine, "--host", host], environment, topology.prefill.tensor_parallel
        )
        return await serve(topology, name, host, arguments.port, command, listen=arguments.listen)

    return run(name, arguments.topology, arguments.set, start)


if __name__ == "__main__":
    sys.exit(main())

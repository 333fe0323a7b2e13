"""`python metronome_worker.py prefill_worker ...`: a worker's own control process, with a metronome for an engine."""

import os
import sys
from pathlib import Path

from cluster.config import Topology
from cluster.server_process import run, worker_parser
from cluster.worker_shell import EngineCommand
from decode_worker.control import serve as serve_decode
from prefill_worker.control import serve as serve_prefill

SERVE = {"prefill_worker": serve_prefill, "decode_worker": serve_decode}


def main(module: str, words: list[str]) -> int:
    arguments = worker_parser(module, "A stand-in.").parse_args(words)
    engine = ["--topology", arguments.topology, "--index", "0", "--name", arguments.name, "--host", arguments.host]
    for override in arguments.set:
        engine += ["--set", override]
    path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"

    async def start(topology: Topology) -> int:
        command = EngineCommand("metronome", engine, {"PYTHONPATH": path})
        name, host, port = arguments.name, arguments.host, arguments.port
        return await SERVE[module](topology, name, host, port, command, listen=arguments.listen)

    return run(arguments.name, arguments.topology, arguments.set, start)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

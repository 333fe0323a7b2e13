"""`python -m decode_worker --topology FILE --index N`: a decode worker; with `--node`, its part on a further host."""

from __future__ import annotations

import sys

from cluster.config import Topology
from cluster.messages import Role
from cluster.worker_process import worker_main
from decode_worker.control import serve
from engine.environment import engine_environment
from kv_transfer.backends import backend_environment


def _environment(topology: Topology) -> dict[str, str]:
    return engine_environment() | backend_environment(topology.kv.transfer)


if __name__ == "__main__":
    sys.exit(worker_main(Role.DECODE, serve, _environment))

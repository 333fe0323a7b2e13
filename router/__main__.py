"""`python -m router --topology FILE`: the only process that clients talk to."""

from __future__ import annotations

import sys

from cluster.server_process import run, topology_parser
from router.server import serve


def main() -> int:
    arguments = topology_parser("router", "Serves OpenAI's API and sends requests to the workers.").parse_args()
    return run("router", arguments.topology, arguments.set, serve)


if __name__ == "__main__":
    sys.exit(main())

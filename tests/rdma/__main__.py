"""`python -m tests.rdma [PYTEST ARGUMENTS]`: the transfer tests over real RDMA verbs, in an emulated machine.

Without arguments: the conformance tests of the transfer engines, whole handoffs, and what is here. Exits with pytest's
status; with 0 and a word where the emulated machine can't be had; with 3 if it did not come to an end.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.rdma.guest import DEVICE, run
from tests.rdma.packages import Lacking, unpacked

TESTS = ("tests/process/test_transfer_backends.py", "tests/process/test_transfer_handoff.py", "tests/rdma")
TIMEOUT_SECONDS = 3600.0
PACE = 15
"""A bound on how many times slower the guest is than a computer, one that others use meanwhile included."""
# Of pytest's plugins these are needed; to load the others takes the guest a minute.
PLUGINS = ("-p", "pytest_asyncio.plugin", "-p", "pytest_timeout", "-p", "no:cacheprovider")
OPTIONS = ("-v", *PLUGINS, "-m", "not soak and not fault", "-o", f"timeout={120 * PACE}")


def main(arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", *OPTIONS, *(arguments or TESTS)]
    environment = {
        "HOME": str(Path.home()),
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "BATON_TEST_NETWORK": "rdma",
        "BATON_TEST_PACE": str(PACE),
        # Both ends are on one host, where UCX would rather copy from memory to memory.
        "UCX_TLS": "rc_v,self",
        "UCX_NET_DEVICES": f"{DEVICE}:1",
        # Living peers are slow here: their patience, too, is longer.
        "UCX_RC_TIMEOUT": "2s",
        "UCX_KEEPALIVE_INTERVAL": f"{20 * PACE}s",
        "MC_TRANSFER_TIMEOUT": "40",
    }
    try:
        status = run(unpacked(), command, environment, TIMEOUT_SECONDS)
    except Lacking as lacking:
        print(f"The emulated machine lacks {lacking}: no RDMA test was run.")
        return 0
    return 3 if status is None else status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

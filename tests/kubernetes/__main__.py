"""`python -m tests.kubernetes [PYTEST ARGUMENTS]`: Baton on a real Kubernetes, in a network of its own.

Namespaces of Linux make that network: nothing of it is seen outside, nobody need be root, and all of it ends with us.
Exits with pytest's status; with 0 and a word where that can't be had.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.kubernetes.packages import Lacking, servers

TESTS = ("tests/kubernetes",)
OPTIONS = ("-v", "-m", "kubernetes", "-p", "no:cacheprovider", "-o", "timeout=1200")
_PREPARE = """
set -e
mount -t tmpfs tmpfs /run
mkdir /run/netns
ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
exec "$@"
"""
"""`ip netns` keeps the pods' networks in /run."""


def _apart() -> list[str]:
    """The command that puts another one into namespaces of its own. Raises `Lacking`."""
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    command += ["sh", "-c", _PREPARE, "sh"]
    tried = subprocess.run([*command, "ip", "link", "add", "pods0", "type", "bridge"], capture_output=True, text=True)
    if tried.returncode != 0:
        raise Lacking(f"the right to make namespaces (as root, or by the kernel's settings): {tried.stderr.strip()}")
    return command


def main(arguments: list[str]) -> int:
    try:
        environment = {**os.environ, "BATON_TEST_KUBERNETES": str(servers())}
        command = [*_apart(), sys.executable, "-m", "pytest", *OPTIONS, *(arguments or TESTS)]
    except Lacking as lacking:
        print(f"The Kubernetes of the tests lacks {lacking}: no Kubernetes test was run.")
        return 0
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

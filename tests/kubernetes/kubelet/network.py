"""An address for each pod: a network namespace on one bridge, which all nodes share; Linux's own, by the program `ip`.

Names of services are told by a hosts file that all containers see, in place of the cluster's DNS.
"""

from __future__ import annotations

import asyncio
import ipaddress
from pathlib import Path

BRIDGE = "pods0"
GATEWAY = "10.244.0.1"
"""The nodes' address, all nodes'."""
_NETWORK = ipaddress.ip_network("10.244.0.0/16")


async def ip(*arguments: str) -> None:
    """Runs `ip`. Raises `OSError` with its complaint."""
    process = await asyncio.create_subprocess_exec("ip", *arguments, stderr=asyncio.subprocess.PIPE)
    _, complaint = await process.communicate()
    if process.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {complaint.decode().strip()}")


class PodNetwork:
    """Owns the pods' namespaces. Addresses are never used twice: a late word to a pod that is gone must not reach
    another one."""

    def __init__(self) -> None:
        self._free = (str(address) for address in _NETWORK.hosts() if str(address) != GATEWAY)
        self._count = 0

    async def join(self) -> tuple[str, str]:
        """A new pod's namespace and address."""
        self._count += 1
        name, link, address = f"pod{self._count}", f"veth{self._count}", next(self._free)
        await ip("netns", "add", name)
        await ip("link", "add", link, "master", BRIDGE, "type", "veth", "peer", "name", "eth0", "netns", name)
        await ip("link", "set", link, "up")
        await ip("-n", name, "address", "add", f"{address}/{_NETWORK.prefixlen}", "dev", "eth0")
        await ip("-n", name, "link", "set", "lo", "up")
        await ip("-n", name, "link", "set", "eth0", "up")
        await ip("-n", name, "route", "add", "default", "via", GATEWAY)
        return name, address

    async def leave(self, namespace: str) -> None:
        await ip("netns", "delete", namespace)


class HostsFiles:
    """One for each namespace, which containers there see as /etc/hosts. Written in place: they have the file itself,
    not its name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._services: dict[tuple[str, str], list[str]] = {}

    def of(self, namespace: str) -> Path:
        path = self._folder / namespace
        if not path.exists():
            path.write_text(self._text(namespace))
        return path

    def set(self, services: dict[tuple[str, str], list[str]]) -> None:
        """The addresses of each service, by its namespace and name, instead of all before."""
        if services != self._services:
            self._services = services
            for path in self._folder.iterdir():
                path.write_text(self._text(path.name))

    def _text(self, ours: str) -> str:
        lines = ["127.0.0.1 localhost"]
        for (namespace, name), addresses in self._services.items():
            full = f"{name}.{namespace}.svc"
            names = f"{full} {full}.cluster.local {name}.{namespace}" + (f" {name}" if namespace == ours else "")
            lines += [f"{address} {names}" for address in addresses]
        return "\n".join([*lines, ""])

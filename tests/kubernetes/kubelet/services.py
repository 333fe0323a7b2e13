"""Services, in place of kube-proxy and the cluster's DNS: their addresses are ours, and lead to pods that are ready.

Each connection to a service's address is relayed to one of its endpoints, as kube-proxy did it before it had iptables.
A service without an address of its own (headless) is its pods' addresses in the hosts file.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools

from tests.kubernetes.kubelet.api import Api, Json
from tests.kubernetes.kubelet.network import HostsFiles, ip

_CHUNK = 65536
Backends = dict[str, list[tuple[str, int]]]
"""By the name of a port."""


class ServiceProxy:
    """`run` follows all services. Listens where they are, until it is cancelled."""

    def __init__(self, api: Api, hosts: HostsFiles) -> None:
        self._api = api
        self._hosts = hosts
        self._services: list[Json] = []
        self._backends: dict[tuple[str, str], Backends] = {}
        """By namespace and name of the service."""
        self._listening: dict[tuple[str, int], asyncio.Server] = {}
        self._turn = itertools.count()

    async def run(self) -> None:
        await asyncio.gather(self._follow_services(), self._follow_endpoints())

    async def _follow_services(self) -> None:
        async for services in self._api.follow("/api/v1/services"):
            self._services = services
            for service in services:
                await self._listen(service)
            self._tell_names()

    async def _follow_endpoints(self) -> None:
        async for listed in self._api.follow("/api/v1/endpoints"):
            self._backends = {_key(each): _backends(each) for each in listed}
            self._tell_names()

    async def _listen(self, service: Json) -> None:
        """Nothing is taken back when a service goes: its address is not used again."""
        address = service["spec"].get("clusterIP")
        if address in (None, "", "None"):
            return
        for port in service["spec"].get("ports", ()):
            place = (address, port["port"])
            if place not in self._listening:
                await ip("address", "replace", f"{address}/32", "dev", "lo")
                relay = _Relay(self, _key(service), port.get("name", ""))
                self._listening[place] = await asyncio.start_server(relay.serve, *place)

    def backend(self, service: tuple[str, str], port: str) -> tuple[str, int] | None:
        """Where the next connection goes."""
        found = self._backends.get(service, {}).get(port)
        return found[next(self._turn) % len(found)] if found else None

    def _tell_names(self) -> None:
        self._hosts.set({_key(service): self._addresses(service) for service in self._services})

    def _addresses(self, service: Json) -> list[str]:
        address = service["spec"].get("clusterIP")
        if address not in (None, "", "None"):
            return [address]
        backends = self._backends.get(_key(service), {})
        return sorted({host for found in backends.values() for host, _ in found})


class _Relay:
    """The connections to one port of one service."""

    def __init__(self, proxy: ServiceProxy, service: tuple[str, str], port: str) -> None:
        self._proxy = proxy
        self._service = service
        self._port = port

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        backend = self._proxy.backend(self._service, self._port)
        # A connection that leads nowhere breaks, as it does with kube-proxy.
        with contextlib.suppress(OSError):
            if backend is not None:
                there_reader, there_writer = await asyncio.open_connection(*backend)
                await asyncio.gather(_copy(reader, there_writer), _copy(there_reader, writer))
        writer.transport.abort()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Raises `OSError` when either side breaks; tells the other side of an end."""
    try:
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        writer.transport.abort()
        raise


def _key(each: Json) -> tuple[str, str]:
    return each["metadata"]["namespace"], each["metadata"]["name"]


def _backends(endpoints: Json) -> Backends:
    found: Backends = {}
    for subset in endpoints.get("subsets") or ():
        for port in subset.get("ports") or ():
            places = [(each["ip"], port["port"]) for each in subset.get("addresses") or ()]
            found.setdefault(port.get("name", ""), []).extend(places)
    return found

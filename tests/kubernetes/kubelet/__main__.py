"""`python -m tests.kubernetes.kubelet JOB`: the agent of all nodes of a test's cluster.

It does what a kubelet, a container runtime, kube-proxy and the cluster's DNS do, as far as Baton's pods need it; each
module says what it stands for. JOB is a JSON file, see `Job`. Runs until it is stopped, and its pods with it.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from pathlib import Path

import aiohttp
import msgspec

from tests.kubernetes.kubelet.api import Api
from tests.kubernetes.kubelet.container import Image
from tests.kubernetes.kubelet.logs import LogServer
from tests.kubernetes.kubelet.network import BRIDGE, GATEWAY, HostsFiles, PodNetwork, ip
from tests.kubernetes.kubelet.node import NodeSpec, register, renew_lease
from tests.kubernetes.kubelet.pod import House, Pod
from tests.kubernetes.kubelet.services import ServiceProxy


class Job(msgspec.Struct, frozen=True):
    url: str
    token: str
    nodes: list[NodeSpec]
    image: Image
    folder: str


class Kubelet:
    """Runs the pods that are bound to its nodes."""

    def __init__(self, nodes: list[NodeSpec], house: House) -> None:
        self._nodes = {node.name for node in nodes}
        self._house = house
        self._pods: dict[str, Pod] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Raises what a pod could not be run for."""
        async for listed in self._house.api.follow("/api/v1/pods"):
            found = {pod["metadata"]["uid"]: pod for pod in listed if pod["spec"].get("nodeName") in self._nodes}
            for uid in self._pods.keys() - found.keys():
                self._pods.pop(uid).update(None)
            for uid, pod in found.items():
                if uid not in self._pods:
                    self._pods[uid] = Pod(pod, self._house)
                    self._running.add(asyncio.create_task(self._pods[uid].run()))
                self._pods[uid].update(pod)
            for task in [task for task in self._running if task.done()]:
                self._running.remove(task)
                task.result()

    def log(self, namespace: str, name: str, container: str, *, previous: bool) -> Path | None:
        """Where a container's log is, if there is such a container."""
        for pod in self._pods.values():
            if pod.name == (namespace, name):
                return next((each.log(previous=previous) for each in pod.containers if each.name == container), None)
        return None


async def main(job: Job) -> None:
    await ip("link", "add", BRIDGE, "type", "bridge")
    await ip("address", "add", f"{GATEWAY}/16", "dev", BRIDGE)
    await ip("link", "set", BRIDGE, "up")
    folder = Path(job.folder)
    hosts = folder / "hosts"
    hosts.mkdir(parents=True)
    headers = {"Authorization": f"Bearer {job.token}"}
    connector = aiohttp.TCPConnector(ssl=False, limit=0)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as session:
        api = Api(session, job.url)
        house = House(api, PodNetwork(), HostsFiles(hosts), job.image, folder)
        kubelet = Kubelet(job.nodes, house)
        port = await LogServer(kubelet.log, _certificate(folder)).start(GATEWAY)
        for node in job.nodes:
            await register(api, node, GATEWAY, port)
        leases = (renew_lease(api, node) for node in job.nodes)
        await asyncio.gather(kubelet.run(), ServiceProxy(api, house.hosts).run(), *leases)


def _certificate(folder: Path) -> ssl.SSLContext:
    """The API server asks for logs over TLS, and takes any certificate."""
    key, certificate = folder / "kubelet.key", folder / "kubelet.crt"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=kubelet", "-days", "30"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job)))

"""Baton on the tests' Kubernetes: from the objects that the chart makes to a client's requests."""

from __future__ import annotations

import asyncio
import base64
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml

from cluster.clock import MonotonicClock
from cluster.config import Security, Topology
from cluster.messages import MemberStatus
from cluster.topology import dump_topology, load_topology
from deploy.cluster_client import ask_bootstrap
from deploy.kubernetes.chart import Object, merge
from deploy.launchers.kubernetes import KubernetesCluster, KubernetesLauncher, render
from tests.kubernetes.control_plane import ControlPlane
from tests.process.api import Api

PATIENCE = 480.0
"""For anything that pods do; where others work, too, an engine takes its time to start."""
TOPOLOGY = Path(__file__).parents[2] / "deploy" / "topologies" / "demo.yaml"
METRONOME = str(Path(__file__).parent / "stand_ins" / "metronome_worker.py")
RELEASE = "baton"
_SMALL = {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}}
_VALUES: dict[str, Any] = {
    "prefill": {"resources": _SMALL, "sharedMemory": "256Mi"},
    "decode": {"resources": _SMALL, "sharedMemory": "256Mi"},
    "router": {"resources": _SMALL},
    "podDisruptionBudget": {"enabled": False},  # policy/v1 is newer than this server
}


class Installation:
    """One Baton in a namespace of its own. `start`, then `stop` in any case."""

    def __init__(
        self, plane: ControlPlane, namespace: str, settings: Sequence[str], values: dict[str, Any], folder: Path
    ) -> None:
        """`values` go over our own."""
        self.namespace = namespace
        self.file = folder / "topology.yaml"
        self.told: list[str] = []
        (folder / "values.yaml").write_text(yaml.safe_dump(merge(_VALUES, values)))
        place = (f"kubernetes.namespace={namespace}", f"kubernetes.values_file={folder / 'values.yaml'}")
        ours = ("launch=kubernetes", "prefill.cpus=[]", "decode.cpus=[]", *place)
        self.topology: Topology = load_topology(TOPOLOGY, (*ours, *settings))
        self.file.write_text(dump_topology(self.topology))
        self._plane = plane
        self._folder = folder
        plane.kubectl("create", "namespace", namespace)

    def start(self, change: Callable[[Object], Object] = lambda made: made) -> KubernetesCluster:
        """Returns when all can serve. `change`: what to do to each object before it is applied."""
        self.objects = [change(made) for made in render(self.topology)]
        launcher = KubernetesLauncher(self.topology, self.objects, MonotonicClock(), self.told.append)
        return asyncio.run(launcher.start(PATIENCE))

    def cluster(self, patience: float = PATIENCE) -> KubernetesCluster:
        return KubernetesCluster(self.topology, self.objects, MonotonicClock(), patience, self.told.append)

    def baton(self, *words: str) -> tuple[str, int]:
        """What the command prints about this cluster, and its exit code."""
        command = [sys.executable, "-m", "deploy.cli", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE)
        return done.stdout, done.returncode

    def stop(self) -> None:
        """Without a farewell."""
        self.kubectl("delete", "deployments", "--all", "--wait=false")
        self.kubectl("delete", "pods", "--all", "--force", "--grace-period=0")

    def kubectl(self, *arguments: str) -> str:
        return self._plane.kubectl("--namespace", self.namespace, *arguments)

    def pods(self, component: str) -> dict[str, tuple[str, int]]:
        """Of each pod that is not leaving: its uid, and how often its container was started again."""
        selector = f"--selector=app.kubernetes.io/component={component}"
        found = self._plane.get("pods", "--namespace", self.namespace, selector)["items"]
        return {
            pod["metadata"]["name"]: (
                pod["metadata"]["uid"],
                sum(each["restartCount"] for each in pod["status"].get("containerStatuses", ())),
            )
            for pod in found
            if "deletionTimestamp" not in pod["metadata"]
        }

    def endpoints(self, component: str) -> set[str]:
        """The names of the pods that the component's service leads to, by its EndpointSlices."""
        selector = f"--selector=kubernetes.io/service-name={RELEASE}-{component}"
        slices = self._plane.get("endpointslices", "--namespace", self.namespace, selector)["items"]
        endpoints = [each for one in slices for each in one.get("endpoints") or ()]
        return {each["targetRef"]["name"] for each in endpoints if each["conditions"].get("ready")}

    @asynccontextmanager
    async def api(self) -> AsyncIterator[Api]:
        """What a client sees who makes a new connection for each request, as through a load balancer."""
        (key,) = (line for line in self._secret("api-keys").splitlines() if line)
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_read=PATIENCE)
        headers = {"Authorization": f"Bearer {key}"}
        async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:
            yield Api(session, self._url("router"))

    async def members(self) -> list[MemberStatus]:
        """The workers that bootstrap knows."""
        secret = self._folder / "secret"
        secret.write_text(self._secret("cluster"))
        security = Security(secret_file=str(secret))
        async with ask_bootstrap(self.topology.bootstrap, security, self._url("bootstrap")) as bootstrap:
            return await bootstrap.workers()

    def kill(self, pod: str) -> None:
        """The first process of a worker's pod, without a word to anybody."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if f"--name={pod}" in words and "kubectl" not in words[0]:
                process.send_signal(signal.SIGKILL)
                return
        raise AssertionError(f"no process of {pod}")

    def _url(self, component: str) -> str:
        spec = self._plane.get("service", "--namespace", self.namespace, f"{RELEASE}-{component}")["spec"]
        return f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}"

    def _secret(self, name: str) -> str:
        data = self._plane.get("secret", "--namespace", self.namespace, f"{RELEASE}-{name}")["data"]
        (value,) = data.values()
        return base64.b64decode(value).decode()


def with_metronomes(made: Object) -> Object:
    """A worker's pod with a stand-in for its engine; all other objects as they are."""
    if made["kind"] == "Deployment" and made["metadata"]["name"] in (f"{RELEASE}-prefill", f"{RELEASE}-decode"):
        (container,) = made["spec"]["template"]["spec"]["containers"]
        container["command"] = ["python", METRONOME, container["command"][-1]]
    return made

"""One pod on one node, from its network to its end; its status is what the API server is told of it."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import NamedTuple

import aiohttp

from tests.kubernetes.kubelet.api import STRATEGIC, Api, ApiError, Json
from tests.kubernetes.kubelet.container import Container, Image, Surroundings
from tests.kubernetes.kubelet.network import GATEWAY, HostsFiles, PodNetwork
from tests.kubernetes.kubelet.node import now
from tests.kubernetes.kubelet.spec import NotYet, Resolver

RETRY_SECONDS = 1.0


class House(NamedTuple):
    """What all pods of this kubelet share."""

    api: Api
    network: PodNetwork
    hosts: HostsFiles
    image: Image
    folder: Path


class Pod:
    """`run` returns when the pod is gone. `update` tells what the API server has of it."""

    def __init__(self, pod: Json, house: House) -> None:
        self.containers: list[Container] = []
        self._pod = pod
        self._house = house
        self._path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
        self.name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        self._uid = pod["metadata"]["uid"]
        self._started = now()
        self._address = ""
        self._trouble = ""
        self._first: list[Container] = []
        """Init containers."""
        self._changed = asyncio.Event()
        self._deleted = asyncio.Event()
        self._gone = False

    def update(self, pod: Json | None) -> None:
        """None: it is there no more."""
        self._gone = pod is None
        self._pod = pod or self._pod
        if pod is None or "deletionTimestamp" in pod["metadata"]:
            self._deleted.set()

    async def run(self) -> None:
        telling = asyncio.create_task(self._tell())
        work = asyncio.create_task(self._work())
        deleted = asyncio.create_task(self._deleted.wait())
        await asyncio.wait({work, deleted}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        await deleted
        grace = 0 if self._gone else self._pod["metadata"].get("deletionGracePeriodSeconds", 30)
        await asyncio.gather(*(each.stop(grace) for each in (*self._first, *self.containers)))
        if not self.containers:
            work.cancel()
        await asyncio.wait({work})
        telling.cancel()
        await asyncio.wait({telling})
        with contextlib.suppress(ApiError):
            options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self._uid}}
            await self._house.api.delete(self._path, {"kind": "DeleteOptions", "apiVersion": "v1", **options})

    async def _work(self) -> None:
        namespace, self._address = await self._house.network.join()
        try:
            around = await self._furnish(namespace)
            spec = self._pod["spec"]
            self._first = [Container(each, around, self._changed.set) for each in spec.get("initContainers", ())]
            self.containers = [Container(each, around, self._changed.set) for each in spec["containers"]]
            self._changed.set()
            for each in self._first:
                await each.run("OnFailure")
            await asyncio.gather(*(each.run(spec.get("restartPolicy", "Always")) for each in self.containers))
        finally:
            await asyncio.gather(*(each.stop(0) for each in (*self._first, *self.containers)))
            await self._house.network.leave(namespace)

    async def _furnish(self, namespace: str) -> Surroundings:
        """Again and again, until all is there that the pod names."""
        folder = self._house.folder / "_".join((*self.name, self._uid))
        resolver = Resolver(self._house.api, self._pod, self._address)
        while True:
            try:
                volumes = await resolver.volumes(folder / "volumes")
                for container in self._pod["spec"]["containers"]:
                    await resolver.environment(container)
            except (NotYet, ApiError) as error:
                self._trouble = str(error)
                self._changed.set()
                await asyncio.sleep(RETRY_SECONDS)
                continue
            hosts = self._house.hosts.of(self._pod["metadata"]["namespace"])
            return Surroundings(
                self._pod, namespace, self._address, folder, volumes, hosts, self._house.image, resolver
            )

    async def _tell(self) -> None:
        """Each change, and of several the last."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            with contextlib.suppress(ApiError, aiohttp.ClientError):
                await self._house.api.patch(f"{self._path}/status", {"status": self._status()}, STRATEGIC)

    def _status(self) -> Json:
        ready = bool(self.containers) and all(each.ready for each in self.containers)
        initialized = bool(self.containers) and all(each.exit_code == 0 for each in self._first)
        conditions = [("Initialized", initialized), ("ContainersReady", ready), ("Ready", ready)]
        return {
            "phase": self._phase(initialized),
            "podIP": self._address,
            "podIPs": [{"ip": self._address}],
            "hostIP": GATEWAY,
            "startTime": self._started,
            "message": self._trouble if not self.containers else None,
            "conditions": [
                {"type": kind, "status": str(value), "lastTransitionTime": now()} for kind, value in conditions
            ],
            "initContainerStatuses": [each.status() for each in self._first],
            "containerStatuses": [each.status() for each in self.containers],
        }

    def _phase(self, initialized: bool) -> str:
        codes = [each.exit_code for each in self.containers]
        over = [not {"running", "waiting"} & each.status()["state"].keys() for each in self.containers]
        if initialized and all(over):
            return "Failed" if any(codes) else "Succeeded"
        return "Running" if initialized else "Pending"

"""The life of one container: a process in namespaces of its own, started again, after a growing pause, when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil

from tests.kubernetes.kubelet import inside
from tests.kubernetes.kubelet.api import Json
from tests.kubernetes.kubelet.node import now
from tests.kubernetes.kubelet.probes import Prober, answers
from tests.kubernetes.kubelet.spec import Resolver, expand

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0
"""A real kubelet's are 10 s and 300 s."""
POLL_SECONDS = 0.05
LIVED_SECONDS = 60.0
"""Who has lived so long starts anew with the first pause."""


class Image(NamedTuple):
    """What takes the place of every container's image."""

    layers: tuple[str, ...]
    """Folders that a container sees where they are, wherever that is."""
    environment: dict[str, str]
    entrypoint: tuple[str, ...]
    """The command of a container that names none."""


class Surroundings(NamedTuple):
    """What a container shares with the others of its pod."""

    pod: Json
    namespace: str
    """Of the network."""
    address: str
    folder: Path
    volumes: dict[str, Path]
    hosts: Path
    image: Image
    resolver: Resolver


class Container:
    """`run`, and in any case `stop`, which lets `run` end. `changed` is called when `status` has."""

    def __init__(self, spec: Json, around: Surroundings, changed: Callable[[], None]) -> None:
        self.name = spec["name"]
        self.ready = False
        self.started = False
        self.exit_code: int | None = None
        """Of the last life, between two."""
        self._spec = spec
        self._around = around
        self._changed = changed
        self._shared = bool(around.pod["spec"].get("shareProcessNamespace"))
        self._restarts = 0
        self._state: Json = {"waiting": {"reason": "ContainerCreating"}}
        self._last_state: Json = {}
        self._process: Process | None = None
        self._environment: dict[str, str] = {}
        self._stopping = asyncio.Event()

    def status(self) -> Json:
        return {
            "name": self.name,
            "image": self._spec["image"],
            "imageID": "",
            "ready": self.ready,
            "started": self.started,
            "restartCount": self._restarts,
            "state": self._state,
            "lastState": self._last_state,
        }

    def log(self, *, previous: bool = False) -> Path:
        return self._around.folder / "logs" / f"{self.name}-{self._restarts - previous}.log"

    async def run(self, policy: str) -> None:
        """One life after the other, as the pod's restart policy says. Raises what `Resolver` raises."""
        pause = FIRST_PAUSE_SECONDS
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            begun = loop.time()
            await self._live()
            if policy == "Never" or (policy == "OnFailure" and self.exit_code == 0) or self._stopping.is_set():
                return
            pause = FIRST_PAUSE_SECONDS if loop.time() - begun > LIVED_SECONDS else pause
            self._last_state, self._state = self._state, {"waiting": {"reason": "CrashLoopBackOff"}}
            self._changed()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
                return
            self._restarts += 1
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def stop(self, grace_seconds: float) -> None:
        """The hook, SIGTERM, and SIGKILL for what is there after `grace_seconds` in all."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._leave(process), grace_seconds)
        self._signal(process, signal.SIGKILL)
        await process.wait()

    async def execute(self, command: Sequence[str]) -> bool:
        """Runs a command beside the container's own; whether it succeeds."""
        if self._process is None or (first := _first_child(self._process.pid)) is None:
            return False
        enter = ["nsenter", f"--target={first}", "--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd"]
        process = await asyncio.create_subprocess_exec(
            *enter, *command, env=self._environment, stdin=asyncio.subprocess.DEVNULL
        )
        return await process.wait() == 0

    async def _leave(self, process: Process) -> None:
        hook = self._spec.get("lifecycle", {}).get("preStop")
        if hook and process.returncode is None:
            await answers(hook, self.execute, self._around.address, self._spec, None)
        while process.returncode is None and self._own_process(process) is None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(POLL_SECONDS)
        self._signal(process, signal.SIGTERM)
        await process.wait()

    async def _live(self) -> None:
        begun = now()
        self._process = process = await self._start()
        if self._stopping.is_set():
            self._signal(process, signal.SIGKILL)
        self._state, self.started = {"running": {"startedAt": begun}}, not self._spec.get("startupProbe")
        self.ready = self.started and not self._spec.get("readinessProbe")
        self._changed()
        probing = asyncio.create_task(self._probe(process))
        code = await process.wait()
        probing.cancel()
        await asyncio.gather(probing, return_exceptions=True)
        self.exit_code = code if code >= 0 else inside.KILLED_BY - code
        self.ready = self.started = False
        ended = {"exitCode": self.exit_code, "startedAt": begun, "finishedAt": now()}
        self._state = {"terminated": {**ended, "reason": "Completed" if code == 0 else "Error"}}
        self._changed()

    async def _start(self) -> Process:
        around, context = self._around, self._spec.get("securityContext") or {}
        image = around.image
        given = await around.resolver.environment(self._spec)
        command = [*(self._spec.get("command") or image.entrypoint), *self._spec.get("args", ())]
        self._environment = {**image.environment, **given}
        root = around.folder / "roots" / f"{self.name}-{self._restarts}"
        root.mkdir(parents=True)
        mounts = [
            (str(around.volumes[mount["name"]] / mount.get("subPath", "")), mount["mountPath"])
            for mount in self._spec.get("volumeMounts", ())
        ]
        job = {
            "root": str(root),
            "layers": image.layers,
            "hosts": str(around.hosts),
            "shared": self._shared,
            "read_only": bool(context.get("readOnlyRootFilesystem")),
            "volumes": sorted(mounts, key=lambda mount: mount[1]),
            "hostname": around.pod["spec"].get("hostname") or around.pod["metadata"]["name"],
            "folder": self._spec.get("workingDir"),
            "command": [expand(word, given) for word in command],
            "environment": self._environment,
        }
        path = around.folder / f"{self.name}-{self._restarts}.json"
        path.write_bytes(msgspec.json.encode(job))
        self.log().parent.mkdir(exist_ok=True)
        with self.log().open("wb") as log:
            return await asyncio.create_subprocess_exec(
                *("ip", "netns", "exec", around.namespace),
                *("unshare", "--pid", "--uts", "--ipc", "--fork", "--kill-child"),
                *(sys.executable, "-I", inside.__file__, str(path)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(os.environ),
            )

    async def _probe(self, process: Process) -> None:
        def readiness(ready: bool) -> None:
            if ready != self.ready:
                self.ready = ready
                self._changed()

        def startup() -> None:
            self.started = True
            self.ready = not self._spec.get("readinessProbe")
            self._changed()

        prober = Prober(self._spec, self.execute, self._around.address)
        await prober.until_it_must_die(startup, readiness)
        self._signal(process, signal.SIGTERM)
        await asyncio.sleep(self._around.pod["spec"].get("terminationGracePeriodSeconds", 30))
        self._signal(process, signal.SIGKILL)

    def _signal(self, process: Process, number: signal.Signals) -> None:
        """SIGKILL to the first process of the pid namespace, without which all others end; others to the container's
        own, which in a namespace that it shares is not the first."""
        if process.returncode is not None:
            return
        receiver = _first_child(process.pid) if number is signal.SIGKILL else self._own_process(process)
        with contextlib.suppress(ProcessLookupError):
            os.kill(receiver or process.pid, number)

    def _own_process(self, process: Process) -> int | None:
        """None: it is not there yet."""
        first = _first_child(process.pid)
        return _first_child(first) if first and self._shared else first


def _first_child(pid: int) -> int | None:
    """By its number outside of its pid namespace."""
    try:
        children = psutil.Process(pid).children()
    except psutil.NoSuchProcess:
        return None
    return children[0].pid if children else None

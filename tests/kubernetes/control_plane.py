"""etcd, the API server, the controllers and the scheduler, and our kubelet with its nodes: a Kubernetes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from tests.kubernetes.kubelet.container import Image
from tests.kubernetes.kubelet.network import GATEWAY
from tests.kubernetes.kubelet.node import NodeSpec

URL = "https://127.0.0.1:6443"
SERVICE_NETWORK = "10.96.0.0/16"
START_SECONDS = 120.0
POLL_SECONDS = 0.1
TAIL_LINES = 30
_TOKEN = "nobody-else-is-in-this-network"
_ETCD = "http://127.0.0.1:2379"


class ControlPlane:
    """`start`, and `stop` in any case. Must be alone in its network namespace: all ports are the usual ones."""

    def __init__(self, servers: Path, folder: Path, nodes: Sequence[NodeSpec], image: Image) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self._servers = servers
        self.folder = folder
        self._nodes = list(nodes)
        self._image = image
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Returns when all nodes are ready."""
        self._write_files()
        key = str(self.folder / "account.key")
        self._run(
            *("etcd", "--data-dir", str(self.folder / "etcd"), "--log-level", "error"),
            *("--listen-client-urls", _ETCD, "--advertise-client-urls", _ETCD),
        )
        self._run(
            *("kube-apiserver", "--etcd-servers", _ETCD, "--cert-dir", str(self.folder / "certificates")),
            *("--service-cluster-ip-range", SERVICE_NETWORK, "--advertise-address", GATEWAY),
            *("--token-auth-file", str(self.folder / "tokens"), "--authorization-mode", "AlwaysAllow"),
            *("--service-account-issuer", "https://kubernetes", "--service-account-key-file", key),
            *("--service-account-signing-key-file", key, "--kubelet-preferred-address-types", "InternalIP"),
        )
        self._wait(lambda: self.kubectl("get", "--raw", "/readyz", check=False) == "ok", "an API server")
        config = ("--kubeconfig", str(self.kubeconfig), "--leader-elect=false")
        self._run("kube-controller-manager", *config, "--service-account-private-key-file", key)
        self._run("kube-scheduler", *config)
        self._start_kubelet()
        self._wait(lambda: len(self._ready_nodes()) == len(self._nodes), "nodes that are ready")

    def stop(self) -> None:
        """At once: nothing of it is used again. The pods end with the namespace that all of this is in."""
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()

    def kubectl(self, *arguments: str, given: str | None = None, check: bool = True) -> str:
        """What it prints; `given` is its input. Raises `AssertionError` with its complaint."""
        command = ["kubectl", f"--kubeconfig={self.kubeconfig}", *arguments]
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get`, as JSON."""
        found: dict[str, Any] = json.loads(self.kubectl("get", "--output=json", *arguments))
        return found

    def log_of(self, pod: dict[str, Any], container: str) -> str:
        """All that a container has written, whether its pod is still there or not."""
        about = pod["metadata"]
        folder = self.folder / "pods" / "_".join((about["namespace"], about["name"], about["uid"]))
        return "".join(path.read_text() for path in sorted(folder.glob(f"logs/{container}-*.log")))

    def tail(self, namespace: str = "") -> str:
        """The last lines of the servers' logs, and of a namespace's pods, for the report of a failure."""
        texts = []
        for path in sorted((*self.folder.glob("*.log"), *self.folder.glob(f"pods/{namespace}_*/logs/*.log"))):
            lines = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
            texts.append("\n".join([f"--- {path.relative_to(self.folder)}", *lines]))
        return "\n".join(texts)

    def _ready_nodes(self) -> list[str]:
        nodes = self.get("nodes")["items"]
        return [node["metadata"]["name"] for node in nodes if not node["spec"].get("taints")]

    def _start_kubelet(self) -> None:
        job = {"url": URL, "token": _TOKEN, "nodes": self._nodes, "image": self._image, "folder": self.folder / "pods"}
        path = self.folder / "kubelet.json"
        path.write_bytes(msgspec.json.encode(job, enc_hook=str))
        self._spawn("kubelet", [sys.executable, "-m", "tests.kubernetes.kubelet", str(path)])

    def _write_files(self) -> None:
        key = self.folder / "account.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        (self.folder / "tokens").write_text(f"{_TOKEN},admin,admin,system:masters\n")
        self.kubeconfig.write_text(yaml.safe_dump(_kubeconfig()))

    def _run(self, program: str, *arguments: str) -> None:
        self._spawn(program, [str(self._servers / program), *arguments])

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self._running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def _wait(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            ended = {name: code for name, each in self._running.items() if (code := each.poll()) is not None}
            assert not ended, f"waiting for {what}: ended with {ended}\n{self.tail()}"
            assert time.monotonic() < deadline, f"not within {START_SECONDS:g} s: {what}\n{self.tail()}"
            time.sleep(POLL_SECONDS)


def _kubeconfig() -> Mapping[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
        "clusters": [{"name": "test", "cluster": {"server": URL, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "admin", "user": {"token": _TOKEN}}],
    }

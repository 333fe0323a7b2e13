"""What the Kubernetes servers are made of, out of Debian's packages: nothing is installed, and nobody need be root.

Debian ships no binaries of kube-apiserver, kube-controller-manager and kube-scheduler, but their source and the Go that
compiles it: 125 MB to fetch and some minutes of all cores, once. etcd comes as a binary.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

RELEASE = "bookworm"
"""The release of Debian whose Kubernetes this is (1.20.2), whatever release runs here."""
SERVERS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler")
_GO = "go-1.19"
_PACKAGES = ("golang-1.19-go", "golang-1.19-src", "etcd-server")
_SOURCE = "kubernetes"
_MIRROR = "http://deb.debian.org/debian"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TOOLS = ("apt-get", "dpkg-deb", "dpkg-source", "kubectl", "ip", "unshare", "mount", "openssl")
_VERSION = "-X k8s.io/component-base/version.git"
_OPENAPI = "k8s.io/kubernetes/pkg/generated/openapi"


class Lacking(Exception):
    """What is not there, and how it is to be had."""


def cache_folder() -> Path:
    """Where the servers are kept once they are built."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "baton" / "kubernetes"


def servers() -> Path:
    """The folder with `SERVERS` and etcd; fetches and builds them unless that has been done. Raises `Lacking`."""
    _require_tools()
    cache = cache_folder()
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix="kubernetes-") as folder:
            _fetch(Path(folder))
            _build(Path(folder))
            (Path(folder) / "bin").replace(cache)
    return cache


def _require_tools() -> None:
    for tool in _TOOLS:
        if shutil.which(tool) is None:
            raise Lacking(f"the program {tool}")
    if not _KEYRING.exists():
        raise Lacking(f"{_KEYRING}, by which Debian's packages are trusted (package debian-archive-keyring)")


def _fetch(folder: Path) -> None:
    """Go and etcd unpacked into `folder`/root, the source into `folder`/source."""
    print("fetching Kubernetes' source, Go and etcd ...", flush=True)
    (folder / "lists" / "partial").mkdir(parents=True)
    kinds = (f"{kind} [signed-by={_KEYRING}] {_MIRROR} {RELEASE} main\n" for kind in ("deb", "deb-src"))
    (folder / "sources.list").write_text("".join(kinds))
    apt = [
        *("apt-get", "--quiet=2", "-o", f"Dir::Etc::SourceList={folder / 'sources.list'}"),
        *("-o", "Dir::Etc::SourceParts=/dev/null", "-o", f"Dir::State::Lists={folder / 'lists'}"),
        # Without the last option, apt warns that its unprivileged user has no access to our folder.
        *("-o", f"Dir::Cache={folder}", "-o", "APT::Sandbox::User=root"),
    ]
    _run([*apt, "update"], folder)
    _run([*apt, "download", *_PACKAGES], folder)
    _run([*apt, "source", "--download-only", _SOURCE], folder)
    for package in folder.glob("*.deb"):
        _run(["dpkg-deb", "--extract", str(package), "root"], folder)
    (description,) = folder.glob(f"{_SOURCE}_*.dsc")
    _run(["dpkg-source", "--no-check", "--extract", str(description), "source"], folder)


def _build(folder: Path) -> None:
    """Compiles the servers into `folder`/bin, and puts etcd beside them."""
    print(f"building {', '.join(SERVERS)}: about 7 minutes on two cores, once ...", flush=True)
    gopath, output = folder / "gopath", folder / "bin"
    (gopath / "src" / "k8s.io").mkdir(parents=True)
    # Go before modules: the code must lie where its import path says, and its dependencies come with it.
    (gopath / "src" / "k8s.io" / "kubernetes").symlink_to(folder / "source")
    root = folder / "root" / "usr" / "lib" / _GO
    environment = {
        **os.environ,
        "GOROOT": str(root),
        "GOPATH": str(gopath),
        "GOCACHE": str(folder / "objects"),
        "GO111MODULE": "off",
        "CGO_ENABLED": "0",
        # With $PWD, Go and its tools take the working directory for the one below GOPATH, and not for its target.
        "PWD": str(gopath / "src" / "k8s.io" / "kubernetes"),
    }
    build = ["nice", "-n", "19", str(root / "bin" / "go"), "build", "-o", f"{output}/"]
    source = folder / "source"
    _run([*build, "./vendor/k8s.io/kube-openapi/cmd/openapi-gen"], source, environment)
    generate = [
        *(str(output / "openapi-gen"), "--go-header-file", "hack/boilerplate/boilerplate.generatego.txt"),
        *("--input-dirs", ",".join(_described(source)), "--output-package", _OPENAPI),
        *("--output-file-base", "zz_generated.openapi", "--output-base", str(gopath / "src")),
        *("--report-filename", str(folder / "violations")),
    ]
    _run(generate, source, environment)
    flags = f"-s -w {_VERSION}Version=v1.20.2 {_VERSION}Major=1 {_VERSION}Minor=20"
    _run([*build, "-ldflags", flags, *(f"./cmd/{server}" for server in SERVERS)], source, environment)
    (output / "openapi-gen").unlink()
    shutil.copy(folder / "root" / "usr" / "bin" / "etcd", output)


def _described(source: Path) -> list[str]:
    """The Go packages whose types the API server describes to its clients; the generator writes these descriptions."""
    marked: set[str] = set()
    for top in ("pkg", "staging/src/k8s.io", "vendor/k8s.io/kube-openapi"):
        for path in (source / top).rglob("*.go"):
            inside = path.relative_to(source)
            other = {"code-generator", "sample-apiserver", "generators"} & set(inside.parts)
            if not other and not path.name.endswith("_test.go") and "+k8s:openapi-gen=" in path.read_text():
                marked.add(str(inside.parent).replace("staging/src/", "vendor/", 1))
    return [f"k8s.io/kubernetes/{folder}" for folder in sorted(marked)]


def _run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> None:
    """Raises `Lacking` with its complaint."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        complaint = done.stderr.strip()[-2000:] or f"exit status {done.returncode}"
        raise Lacking(f"what comes of {Path(command[0]).name} {command[1]}: {complaint}")

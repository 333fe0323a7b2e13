"""What the emulated machine needs, taken out of the distribution's packages: nothing is installed, and nobody need be
root. Debian on x86-64; fetched once, about 90 MB.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path.home() / ".cache" / "baton" / "rdma"
KERNEL = "linux-image-amd64"
"""A package without content, which depends on the newest kernel's."""
TOOLS = ("busybox-static", "ibverbs-providers")
EMULATOR = "qemu-system-x86"
_LIBRARIES = "x86_64-linux-gnu"


class Lacking(Exception):
    """What is not there, and how it is to be had."""


@dataclass(frozen=True)
class Unpacked:
    """The packages' files below `root`, which is laid out as / would be."""

    root: Path

    @property
    def kernel(self) -> Path:
        return next((self.root / "boot").glob("vmlinuz-*"))

    @property
    def modules(self) -> Path:
        """The folder of this kernel's modules."""
        return next((self.root / "lib" / "modules").iterdir())

    @property
    def busybox(self) -> Path:
        return self.root / "bin" / "busybox"

    @property
    def verbs_provider(self) -> Path:
        """The library by which libibverbs drives a card in software."""
        return self.root / "usr" / "lib" / _LIBRARIES / "libibverbs" / "librxe-rdmav34.so"

    def emulator(self) -> tuple[list[str], dict[str, str]]:
        """The command and what it wants in its environment: the system's own, or else the one unpacked here."""
        installed = shutil.which("qemu-system-x86_64")
        if installed is not None:
            return [installed], {}
        folders = [self.root / "usr" / "share" / name for name in ("qemu", "seabios")]
        command = [str(self.root / "usr" / "bin" / "qemu-system-x86_64")]
        for folder in folders:
            command += ["-L", str(folder)]
        libraries = [self.root / "usr" / "lib" / _LIBRARIES, self.root / "lib" / _LIBRARIES]
        return command, {"LD_LIBRARY_PATH": ":".join(map(str, libraries))}


def unpacked() -> Unpacked:
    """Fetches and unpacks the packages, unless that has been done. Raises `Lacking`."""
    if not CACHE.exists():
        _require_debian()
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent, prefix="rdma-") as folder:
            _fetch(Path(folder))
            _unpack(Path(folder))
            (Path(folder) / "root").replace(CACHE)
    return Unpacked(CACHE)


def _require_debian() -> None:
    if platform.machine() != "x86_64":
        raise Lacking(f"an x86-64 processor (this is {platform.machine()}); the guest's kernel is built for one")
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise Lacking(f"{tool}; the kernel and QEMU are taken out of Debian's packages")


def _fetch(folder: Path) -> None:
    """The packages' files, into `folder`."""
    names = [*_kernels(), *TOOLS]
    if shutil.which("qemu-system-x86_64") is None:
        names += _missing_for(EMULATOR)
    print(f"fetching {len(names)} packages ...", flush=True)
    # Without the option, apt warns that its unprivileged user has no access to our folder.
    _run(["apt-get", "-o", "APT::Sandbox::User=root", "--quiet=2", "download", *names], folder)


def _kernels() -> list[str]:
    """The package that holds the newest kernel."""
    lines = _run(["apt-cache", "depends", "--important", KERNEL], Path.cwd()).splitlines()
    found = [line.split()[-1] for line in lines if "Depends: linux-image-" in line]
    if not found:
        raise Lacking(f"the package {KERNEL} (Debian's kernel)")
    return found


def _missing_for(package: str) -> list[str]:
    """It and those of its dependencies that this system has not installed."""
    lines = _run(["apt-get", "--simulate", "--no-install-recommends", "install", package], Path.cwd()).splitlines()
    return [line.split()[1] for line in lines if line.startswith("Inst ")]


def _unpack(folder: Path) -> None:
    """All packages into `folder`/root, and the index of the kernel's modules, which an installation would make."""
    root = folder / "root"
    for package in sorted(folder.glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(root)], folder)
    files = Unpacked(root)
    _run([str(files.busybox), "depmod", "-b", str(root), files.modules.name], folder)


def _run(command: list[str], folder: Path) -> str:
    """Its output. Raises `Lacking` with its complaint."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        complaint = done.stderr.strip() or f"exit status {done.returncode}"
        raise Lacking(f"packages ({' '.join(command[:2])}: {complaint}); does apt-get update help?")
    return done.stdout

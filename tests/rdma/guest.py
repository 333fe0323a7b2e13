"""An emulated machine that sees this one's files, read-only, and has a network card that speaks RDMA verbs.

QEMU emulates the processor (no KVM, no root, no network), Debian's kernel makes the card in software (soft-RoCE), and
`init.sh` sets it up. The guest starts in seconds; after that it takes ten times as long as its host for everything.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.rdma.packages import Lacking, Unpacked

DEVICE = "rxe0"
MEMORY = "4G"
CORES = 2
_HERE = Path(__file__).parent
_TO_MOUNT = ("virtio_pci", "9pnet_virtio", "9p")
"""Modules without which the guest can't reach the others."""
# Guarding the kernel from its programs costs an emulated processor most of its time, and on a busy host its clock fails
# the kernel's check.
_KERNEL_OPTIONS = "console=ttyS0 quiet panic=-1 mitigations=off no5lvl nosmap nosmep no_timer_check"


def run(unpacked: Unpacked, command: Sequence[str], environment: Mapping[str, str], timeout: float) -> int | None:
    """Runs `command` in a guest, as root, in this working directory; its output goes to ours. Returns its exit status,
    or None if the guest came to no end within `timeout` seconds, or to none that it could tell."""
    with tempfile.TemporaryDirectory(prefix="baton-rdma-") as name:
        folder = Path(name)
        initrd = _make_initrd(unpacked, folder, _script(command, environment))
        status = folder / "status"
        emulator, settings = unpacked.emulator()
        options = _options(unpacked, initrd, status)
        with subprocess.Popen(
            ["nice", "-n", "19", *emulator, *options], stdin=subprocess.DEVNULL, env={**os.environ, **settings}
        ) as machine:
            try:
                machine.wait(timeout)
            except subprocess.TimeoutExpired:
                print(f"the guest has been ended after {timeout:g} s", file=sys.stderr)
            finally:
                machine.kill()
        told = status.read_text().strip() if status.exists() else ""
        return int(told) if told else None


def _options(unpacked: Unpacked, initrd: Path, status: Path) -> list[str]:
    """QEMU's. Of two serial lines one is the guest's console and ours, the other takes the exit status."""
    return [
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(CORES), "-m", MEMORY),
        *("-nodefaults", "-no-reboot", "-display", "none", "-monitor", "none"),
        *("-serial", "stdio", "-serial", f"file:{status}"),
        *("-kernel", str(unpacked.kernel), "-initrd", str(initrd)),
        *("-append", f"{_KERNEL_OPTIONS} MODULES={unpacked.modules.parent} DEVICE={DEVICE}"),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
    ]


def _script(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """What the guest's shell does."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*lines, f"cd {shlex.quote(str(Path.cwd()))}", f"exec {shlex.join(command)}", ""])


def _make_initrd(unpacked: Unpacked, folder: Path, script: str) -> Path:
    """The files that the guest begins with: busybox, a few modules, `init.sh`, what to lay over the host's files, and
    /job, the script."""
    content = folder / "content"
    for name in ("bin", "dev", "proc", "sys"):
        (content / name).mkdir(parents=True)
    shutil.copy(unpacked.busybox, content / "bin")
    shutil.copy(_HERE / "init.sh", content / "init")
    (content / "init").chmod(0o755)
    (content / "job").write_text(script)
    _copy_modules(unpacked.modules, content / "lib" / "modules" / unpacked.modules.name)
    _add_verbs(unpacked, content / "files")
    names = "\n".join(str(path.relative_to(content)) for path in sorted(content.rglob("*")))
    initrd = folder / "initrd"
    with initrd.open("wb") as archive:
        pack = [str(unpacked.busybox), "cpio", "-o", "-H", "newc"]
        subprocess.run(pack, cwd=content, input=names.encode(), stdout=archive, stderr=subprocess.DEVNULL, check=True)
    return initrd


def _copy_modules(source: Path, target: Path) -> None:
    """Those of `_TO_MOUNT` and what they depend on, with an index of them."""
    index = dict(line.split(":") for line in (source / "modules.dep").read_text().splitlines())
    lines = []
    for wanted in _TO_MOUNT:
        path = next(path for path in index if Path(path).stem == wanted)
        for needed in (path, *index[path].split()):
            lines.append(f"{needed}:{index[needed]}\n")
            (target / needed).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / needed, target / needed)
    (target / "modules.dep").write_text("".join(dict.fromkeys(lines)))


def _add_verbs(unpacked: Unpacked, root: Path) -> None:
    """The driver of the card, for the libibverbs in NIXL's wheel, and that one for everybody: a driver makes itself
    known to the library that it is linked to, and a second one would never hear of it."""
    bundles = (Path(sysconfig.get_path("purelib")) / f"nixl_{build}.libs" for build in ("cu13", "cu12"))
    library = next((found for bundle in bundles for found in bundle.glob("libibverbs-*.so*")), None)
    if library is None:
        raise Lacking("NIXL's wheel with its libibverbs (make setup)")
    drivers, libraries, names = (
        root / "usr/lib64/libibverbs",
        root / "usr/lib/x86_64-linux-gnu",
        root / "etc/libibverbs.d",
    )
    for folder in (drivers, libraries, names):
        folder.mkdir(parents=True)
    shutil.copy(unpacked.verbs_provider, drivers)
    (names / "rxe.driver").write_text("driver rxe\n")
    (libraries / "libibverbs.so.1").symlink_to(library)

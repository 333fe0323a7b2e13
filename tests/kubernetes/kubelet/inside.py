"""The first program in a container: makes its file system, then becomes the container's own program, or where the pod's
processes are to share one pid namespace, the parent of it, as the pause container is.

Runs as `python -I inside.py JOB` in new mount and pid namespaces, alone. There is no image: its place is taken by this
machine's files, read-only or not as the pod asks, with a /proc, /dev/shm and /tmp of its own. Volumes are bound where
the pod wants them; folders that are not there for that are made in a copy of the folder above, whose entries are bound
from the machine.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
from pathlib import Path
from typing import Any

_BIND, _RECURSIVE = 4096, 16384
_MOUNT_SETATTR, _AT_RECURSIVE, _READ_ONLY = 442, 0x8000, 1
"""See mount(2) and mount_setattr(2)."""
KILLED_BY = 128
"""The exit code of a program that a signal has killed is so much more than the signal's number."""
_libc = ctypes.CDLL(None, use_errno=True)


class Root:
    """The file system below `root`, being made."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: set[Path] = set()
        """Folders that take more entries without the machine's doing so."""
        self._copy(Path("/"))

    def prepare(self, target: Path, *, folder: bool) -> None:
        """Makes the place at which something can be bound."""
        place = self._place(target)
        if place.exists():
            return
        existing = next(parent for parent in target.parents if self._place(parent).exists())
        if existing not in self._made:
            self._copy(existing)
        self._made.update(parent for parent in target.parents if existing in parent.parents)
        place.parent.mkdir(parents=True, exist_ok=True)
        if folder:
            place.mkdir()
        else:
            place.touch()

    def bind(self, source: Path, target: Path) -> None:
        """Puts a folder or a file at `target`."""
        self.prepare(target, folder=source.is_dir())
        _mount(str(source), self._place(target), None, _BIND | _RECURSIVE)
        self._made.add(target)

    def fresh(self, target: Path, kind: str) -> None:
        """An empty file system of that kind, where a folder is."""
        _mount(kind, self._place(target), kind, 0)
        self._made.add(target)

    def make_read_only(self) -> None:
        """All that is there by now."""
        attributes = struct.pack("QQQQ", _READ_ONLY, 0, 0, 0)
        path = str(self._root).encode()
        if _libc.syscall(_MOUNT_SETATTR, -100, path, _AT_RECURSIVE, attributes, len(attributes)) != 0:
            raise OSError(ctypes.get_errno(), "mount_setattr")

    def enter(self) -> None:
        os.chroot(self._root)
        os.chdir("/")

    def _copy(self, folder: Path) -> None:
        """Replaces a folder by one that has the same entries and takes more."""
        entries = sorted(folder.iterdir())
        self.fresh(folder, "tmpfs")
        for entry in entries:
            place = self._place(entry)
            if entry.is_symlink():
                place.symlink_to(entry.readlink())
                continue
            if entry.is_dir():
                place.mkdir()
            else:
                place.touch()
            _mount(str(entry), place, None, _BIND | _RECURSIVE)

    def _place(self, path: Path) -> Path:
        return self._root / path.relative_to("/")


def _mount(source: str, target: Path, kind: str | None, flags: int) -> None:
    encoded = None if kind is None else kind.encode()
    if _libc.mount(source.encode(), str(target).encode(), encoded, flags, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"can't mount {source} at {target}: {os.strerror(number)}")


def _be_parent_until_the_end_of(child: int) -> None:
    """And of whoever has lost theirs. Does not return."""
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else KILLED_BY - code)


def main(job: dict[str, Any]) -> None:
    """See `container.py` for what a job is. Does not return."""
    root = Root(Path(job["root"]))
    layers = [Path(layer) for layer in job["layers"]]
    root.fresh(Path("/tmp"), "tmpfs")
    for layer in layers:
        root.bind(layer, layer)
    volumes = [(Path(source), Path(target)) for source, target in job["volumes"]]
    for source, target in volumes:
        root.prepare(target, folder=source.is_dir())
    root.bind(Path(job["hosts"]), Path("/etc/hosts"))
    if job["read_only"]:
        root.make_read_only()
    root.fresh(Path("/proc"), "proc")
    root.fresh(Path("/dev/shm"), "tmpfs")
    for source, target in volumes:
        root.bind(source, target)
        for layer in layers:
            if target in layer.parents:
                root.bind(layer, layer)
    root.enter()
    socket.sethostname(job["hostname"])
    if job["folder"]:
        os.chdir(job["folder"])
    if job["shared"] and (child := os.fork()):
        _be_parent_until_the_end_of(child)
    try:
        os.execvpe(job["command"][0], job["command"], job["environment"])
    except OSError as error:
        sys.exit(f"{job['command'][0]}: {error.strerror}")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

"""Where a `baton up` keeps its logs and its topology, and how other commands of this user find it.

A cluster is known by bootstrap's port, which no two clusters of a machine share. Among the temporary files is a folder
that is open to its user alone; there, PORT.sock is the socket of `deploy.control` and PORT a link to the run directory.
So whoever may connect is whom the system lets in, and neither a port nor a password is needed. What a killed `baton up`
left behind answers nobody, and is replaced by the next one.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cluster.config import Topology
from cluster.errors import LaunchError
from cluster.topology import dump_topology

TOPOLOGY_FILE = "topology.yaml"


class Running(NamedTuple):
    """A `baton up` of this machine and user, as it was last heard of."""

    socket: Path
    directory: Path

    @property
    def topology_file(self) -> Path:
        """What its processes read: all is decided in it, free ports too."""
        return self.directory / TOPOLOGY_FILE


def make_run_directory(wanted: Path | None) -> Path:
    """`wanted`, or a new one. Raises `LaunchError`."""
    try:
        if wanted is None:
            return Path(tempfile.mkdtemp(prefix="baton-"))
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"can't make the log directory: {error}") from error
    return wanted.absolute()


def write_topology(directory: Path, topology: Topology) -> Path:
    """One file in which all is decided, so that no process decides otherwise. Raises `LaunchError`."""
    path = directory / TOPOLOGY_FILE
    try:
        path.write_text(dump_topology(topology))
    except OSError as error:
        raise LaunchError(f"can't write to the log directory: {error}") from error
    return path


@contextlib.contextmanager
def announced(port: int, directory: Path) -> Iterator[Running]:
    """While the block runs, `find_running` finds it. Raises `LaunchError`."""
    running = _entry(port)
    _sweep(running.directory.parent)
    _forget(running)
    running.directory.symlink_to(directory)
    try:
        yield running
    finally:
        _forget(running)


def find_running(port: int) -> Running | None:
    """The `baton up` whose bootstrap has this port; whether it still runs, its socket shows."""
    running = _entry(port)
    return running if running.socket.exists() and running.topology_file.exists() else None


def _entry(port: int) -> Running:
    folder = _own_folder()
    return Running(folder / f"{port}.sock", folder / str(port))


def _own_folder() -> Path:
    """Raises `LaunchError` if somebody else has taken its place, or could look into it."""
    folder = Path(tempfile.gettempdir()) / f"baton-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise LaunchError(f"{folder} must be a folder that only its owner, user {os.getuid()}, may enter")
    return folder


def _sweep(folder: Path) -> None:
    """Removes what killed ones left behind, once their run directories are gone."""
    for link in folder.iterdir():
        if link.is_symlink() and not link.exists():
            _forget(_entry(int(link.name)))


def _forget(running: Running) -> None:
    for path in running:
        path.unlink(missing_ok=True)

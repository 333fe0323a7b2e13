"""What tells one version of a file from the next."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class FileVersion(NamedTuple):
    """A file that was replaced, as by Kubernetes for a mounted Secret, has another inode."""

    changed_ns: int
    inode: int
    size: int


def version_of(file: Path) -> FileVersion:
    """Raises `OSError` if it can't be looked at."""
    found = file.stat()
    return FileVersion(found.st_mtime_ns, found.st_ino, found.st_size)

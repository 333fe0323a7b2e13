"""Where a figure was measured: without it, it is none."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import psutil

PACKAGES = ("baton-serving", "torch", "nixl", "mooncake-transfer-engine-non-cuda", "aiohttp", "uvloop", "tokenizers")


class Setting(msgspec.Struct, frozen=True):
    """A machine at a time, and the command that ran there."""

    measured_at: str
    command: str
    commit: str
    processor: str
    cores_used: list[int]
    cores_of_machine: int
    memory_gib: float
    system: str
    python: str
    versions: dict[str, str]


def describe_setting(command: Sequence[str] | None = None) -> Setting:
    """Of this process, now; `command` is what a user typed, by default a command of this package. `cores_used` are
    those that this process, and so its children, may run on."""
    return Setting(
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(command or ["python", "-m", "bench", *sys.argv[1:]]),
        commit=_commit(),
        processor=_processor(),
        cores_used=sorted(os.sched_getaffinity(0)),
        cores_of_machine=psutil.cpu_count(logical=True) or 0,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: found for name in PACKAGES if (found := _version(name)) is not None},
    )


def _commit() -> str:
    """With "+" for a tree that differs from it; "unknown" outside of a repository."""
    root = Path(__file__).parent.parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def _processor() -> str:
    """The kernel's name of the first core's model; some machines' `platform.processor` says nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

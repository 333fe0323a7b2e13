"""Compiles `kernels.cpp` for this machine's processor, keeps the result, and loads it.

The compiler is the system's g++. What it made is kept under ~/.cache/baton by the sources, the compiler and the
processor, so a second start (and a second worker) finds it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ConfigError
from engine.device import processor_features

SOURCES = Path(__file__).parent
CACHE = Path(".cache", "baton")
"""In the user's home; without one that can be written to, in the folder for temporary files."""
COMPILER = "g++"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden")
NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
"""Processor features, as /proc/cpuinfo names them."""


class NativeUnavailable(ConfigError):
    """This machine can't run the kernels, or can't compile them; the message says why, and what to do."""


class Shape(ctypes.Structure):
    """Of the model. This and the next three mirror kernels.cpp: same order, same types."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "page_size")),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
    )


class LayerPointers(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("attention_norm", "query_key_value", "query_key_value_bias", "query_key_norm"),
                *("output", "output_bias", "mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias"),
                "cache",
            )
        ),
        ("window", ctypes.c_int32),
    )


class StepPointers(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "spans")),
        ("span", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("page_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("cosine", "sine", "slots"),
                *("hidden", "normed", "query_key_value", "attended", "activated", "share"),
            )
        ),
    )


class HeadPointers(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "inputs", "outputs")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("hidden", "norm", "packed", "logits")),
    )


def load() -> ctypes.CDLL:
    """The kernels, compiled if they are not there yet (some seconds). Raises `NativeUnavailable`."""
    features = processor_features()
    missing = sorted(NEEDED - features)
    if missing:
        raise NativeUnavailable(f"the native kernels need a processor with {', '.join(missing)}")
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise NativeUnavailable(f"the native kernels are compiled when they are first used: install {COMPILER}")
    try:
        return ctypes.CDLL(str(_compiled(compiler, features)))
    except OSError as error:
        raise NativeUnavailable(f"the native kernels don't load: {error}") from error


def _compiled(compiler: str, features: frozenset[str]) -> Path:
    version = _run([compiler, "--version"])
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    described = [version, *FLAGS, *sorted(features), *(path.read_text() for path in sources)]
    digest = hashlib.sha256("\0".join(described).encode()).hexdigest()[:24]
    name = f"kernels-{digest}.so"
    made_before = _made_before(name)
    if made_before is not None:
        return made_before
    library = _cache() / name
    if not library.exists():
        # Workers start together: one compiles, the others wait for it.
        with _lock(library.with_suffix(".lock")):
            if not library.exists():
                _compile(compiler, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, library.name)
        _run([compiler, *FLAGS, str(SOURCES / "kernels.cpp"), "-o", str(made)])
        made.replace(library)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise NativeUnavailable(f"the native kernels don't compile: {' '.join(command[:2])} ...: {complaint}")
    return done.stdout


def _made_before(name: str) -> Path | None:
    """Made by us, or by root: a container's image brings it in a folder that can't be written to."""
    trusted = {0, os.getuid()}
    for folder in _folders():
        library = folder / name
        if library.is_file() and {folder.stat().st_uid, library.stat().st_uid} <= trusted:
            return library
    return None


def _folders() -> tuple[Path, Path]:
    return Path.home() / CACHE, Path(tempfile.gettempdir(), f"baton-{os.getuid()}")


def _cache() -> Path:
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise NativeUnavailable("the native kernels have nowhere to be kept: neither ~/.cache nor /tmp can be written to")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Among processes of this machine; the kernel gives it back when a process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

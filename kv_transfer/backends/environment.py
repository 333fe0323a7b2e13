"""The environment that the transfer engines want: settings read when they load, and libraries that they miss.

What the user has set always wins. Importing this loads no engine.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from cluster.config import KV, Network, TransferName

DEFAULTS: Final[Mapping[TransferName, Mapping[str, str]]] = {
    TransferName.NIXL: {
        # Faults reach us as exceptions; what these would write is noise beside them.
        "NIXL_LOG_LEVEL": "FATAL",
        "UCX_LOG_LEVEL": "fatal",
        # Without them a partition leaves a write pending for minutes, and a connect blocks for one.
        "UCX_TCP_USER_TIMEOUT": "5s",
        "UCX_TCP_SYN_CNT": "2",
        # The same for RDMA: about four seconds without an acknowledgement. UCX's own 7 times a second are half a minute
        # on NICs, which may wait for four times as long as they are told, and no end at all on soft-RoCE.
        "UCX_RC_TIMEOUT": "500ms",
        "UCX_RC_RETRY_COUNT": "6",
    },
    TransferName.MOONCAKE: {
        "MC_LOG_LEVEL": "ERROR",
        "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535",
        "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
        # Seconds; Mooncake takes no less than 5, and waits for 30 by itself.
        "MC_TRANSFER_TIMEOUT": "10",
    },
}

_WANTED = "libibverbs.so.1"
_BUNDLES = ("nixl_cu13", "nixl_cu12")
"""NIXL's wheels; each keeps its libraries in a folder NAME.libs beside itself."""


def backend_environment(name: TransferName) -> dict[str, str]:
    """What to add to the environment of a process that will call `open_backend`."""
    found = {key: value for key, value in DEFAULTS[name].items() if key not in os.environ}
    folder = library_path() if name is TransferName.MOONCAKE else None
    if folder is not None:
        inherited = os.environ.get("LD_LIBRARY_PATH")
        found["LD_LIBRARY_PATH"] = f"{folder}:{inherited}" if inherited else str(folder)
    return found


def apply_defaults(name: TransferName) -> None:
    """The settings, for this process; before the engine is loaded. A library path would come too late."""
    for key, value in DEFAULTS[name].items():
        os.environ.setdefault(key, value)


def apply_network(kv: KV, ports: Sequence[str]) -> None:
    """An engine's choice of ways to a peer, for this process; before it is loaded. `ports` as of `verbs.usable_ports`.

    UCX keeps its ways within a host, and those between a GPU and the rest.
    """
    if kv.transfer is TransferName.MOONCAKE:
        if not ports:  # asked for "tcp", it uses RDMA devices all the same
            os.environ.setdefault("MC_FORCE_TCP", "true")
    elif kv.network is Network.TCP:
        os.environ.setdefault("UCX_TLS", "^ib")
    elif kv.network is Network.RDMA:
        os.environ.setdefault("UCX_TLS", "^tcp")
        os.environ.setdefault("UCX_NET_DEVICES", ",".join(ports))
        if len(kv.rdma_devices) > 1:  # by itself UCX may use fewer for one write
            os.environ.setdefault("UCX_MAX_RMA_RAILS", str(len(ports)))


def library_path() -> Path | None:
    """A folder for LD_LIBRARY_PATH with the libibverbs.so.1 that Mooncake needs: the copy that NIXL's wheel bundles.
    None if the system has one, or if nobody has.

    The folder holds links and is made once, in the environment's lib/baton or else in a folder of the user's own.
    """
    if ctypes.util.find_library("ibverbs") is not None:
        return None
    bundled = _bundled()
    if bundled is None:
        return None
    for folder in (Path(sys.prefix) / "lib" / "baton", Path(tempfile.gettempdir()) / f"baton-libraries-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _link_all(bundled, folder)
        except OSError:
            continue
        return folder
    return None


def _bundled() -> Path | None:
    """The library in NIXL's wheel."""
    for name in _BUNDLES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        found = sorted((Path(spec.origin).parent.parent / f"{name}.libs").glob("libibverbs-*.so*"))
        if found:
            return found[0]
    return None


def _link_all(bundled: Path, folder: Path) -> None:
    """The library under the name that Mooncake asks for, and what it needs itself (libnl) under the bundle's names."""
    _link(folder / _WANTED, bundled)
    for needed in bundled.parent.glob("libnl-*.so*"):
        _link(folder / needed.name, needed)


def _link(link: Path, target: Path) -> None:
    """Replaces a link of an earlier environment; atomic, as several workers start at once."""
    if link.is_symlink() and link.readlink() == target:
        return
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)

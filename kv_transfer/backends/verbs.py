"""RDMA devices: which of this host's are up, and which of them this process has really opened.

The engines choose by themselves, and fall back to TCP without a word. So what is asked for is looked up in the kernel's
lists before an engine starts, and what the engine has done among the process's own open files after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.config import KV, Network
from cluster.errors import ConfigError

_DEVICES = Path("/sys/class/infiniband")
_OPEN_FILES = Path("/proc/self/fd")
_VERBS = Path("/sys/class/infiniband_verbs")
"""For each /dev/infiniband/uverbsN, the device it belongs to."""

_ACTIVE = "4: ACTIVE"


def usable_ports(kv: KV) -> tuple[str, ...]:
    """The ports that are up, of `kv.rdma_devices` or of all devices, as DEVICE:PORT; none if `kv.network` is tcp.

    Raises `ConfigError` if it is rdma and there is none, or a device of `kv.rdma_devices` has none.
    """
    if kv.network is Network.TCP:
        return ()
    found = _active_ports()
    if kv.network is not Network.RDMA:
        return found
    if not found:
        raise ConfigError(f"kv.network: rdma: no RDMA device is up ({_DEVICES}: {', '.join(_devices()) or 'none'})")
    for name in kv.rdma_devices:
        if name not in devices_of(found):
            raise ConfigError(f"kv.rdma_devices: {name} is not up; up are: {', '.join(devices_of(found))}")
    return tuple(port for port in found if not kv.rdma_devices or port.partition(":")[0] in kv.rdma_devices)


def devices_of(ports: Sequence[str]) -> tuple[str, ...]:
    """Each device once."""
    return tuple(dict.fromkeys(port.partition(":")[0] for port in ports))


def opened_devices() -> tuple[str, ...]:
    """Those that this process holds open, by whatever library."""
    files = set()
    for link in _OPEN_FILES.iterdir():
        try:
            target = link.readlink()
        except OSError:  # closed since it was listed
            continue
        if target.name.startswith("uverbs"):
            files.add(target.name)
    return tuple(sorted((_VERBS / name / "ibdev").read_text().strip() for name in files))


def require_opened(kv: KV) -> None:
    """Raises `ConfigError` if `kv.network` is rdma and the engine, once it is open, has opened no device, or another
    than those of `kv.rdma_devices`."""
    if kv.network is not Network.RDMA:
        return
    opened = opened_devices()
    if not opened:
        raise ConfigError(f"kv.network: rdma: {kv.transfer.value} has opened no RDMA device; does its driver fit?")
    strangers = set(opened) - set(kv.rdma_devices or opened)
    if strangers:
        raise ConfigError(f"kv.rdma_devices: {kv.transfer.value} has opened {', '.join(sorted(strangers))} too")


def _devices() -> list[str]:
    return sorted(device.name for device in _DEVICES.iterdir()) if _DEVICES.is_dir() else []


def _active_ports() -> tuple[str, ...]:
    ports = (port for device in _devices() for port in sorted((_DEVICES / device / "ports").iterdir()))
    return tuple(
        f"{port.parent.parent.name}:{port.name}" for port in ports if (port / "state").read_text().strip() == _ACTIVE
    )

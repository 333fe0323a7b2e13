"""How much memory a device has, what this process has of it, and what it is for.

A GPU's memory is counted by torch, and by the driver what torch does not know of. On a CPU it is that of the machine or
of this process's cgroup, whichever is less, and ours is what is resident and no file's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import psutil
import torch

from cluster.errors import ConfigError
from cluster.memory_plan import MemoryUse

GIB = 1 << 30
MOST_OUTSIDE_TORCH = 2 * GIB
"""Of a GPU, by one process: CUDA's context, kernels, NCCL. What the driver counts beyond is other processes'."""
_NO_GRAPH = (0, 0)
"""The pool of segments that no CUDA graph owns."""
_RESET_PEAK = "5"
"""Written to clear_refs: the peak of resident memory is forgotten. proc(5)."""


class DeviceMemory(Protocol):
    """Of one device, as one process sees it; made before anything is loaded. Sizes are in bytes."""

    total: int
    """What `kv.memory_fraction` is a fraction of."""

    def free(self) -> int:
        """For whoever asks first."""

    def held(self) -> int:
        """What this process has of it."""

    def watch(self) -> None:
        """From now on `peak` looks."""

    def peak(self) -> int:
        """The most that this process has had of it since `watch`, or since its start."""

    def graphs(self) -> int:
        """What captured graphs keep for themselves, of what is held."""


class CudaMemory:
    """Implements `DeviceMemory`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total = torch.cuda.mem_get_info(device)[1]

    def free(self) -> int:
        return free_memory(self._device)

    def held(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device) + self._outside_torch()

    def watch(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device) + self._outside_torch()

    def graphs(self) -> int:
        # This process has one device, so all of them are its.
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) != _NO_GRAPH)

    def _outside_torch(self) -> int:
        others = self.total - self.free() - torch.cuda.memory_reserved(self._device)
        return min(max(0, others), MOST_OUTSIDE_TORCH)


class HostMemory:
    """Implements `DeviceMemory`."""

    def __init__(self, root: Path = Path("/")) -> None:
        """`root`: where to find proc and sys."""
        self._root = root
        self._own = root / "proc" / "self"
        self.total = self.free()
        self._before = _anonymous_bytes()
        self._watched: tuple[int, int] | None = None
        """Held, and resident, when the peak was forgotten."""

    def free(self) -> int:
        available: int = min([psutil.virtual_memory().available, *cgroup_room(self._root)])
        return available

    def held(self) -> int:
        return max(0, _anonymous_bytes() - self._before)

    def watch(self) -> None:
        self._watched = None
        with suppress(OSError):  # a system without it, or one that does not let us
            (self._own / "clear_refs").write_text(_RESET_PEAK)
            self._watched = self.held(), self._most_resident()

    def peak(self) -> int:
        if self._watched is None:
            return self.held()
        held, resident = self._watched
        return max(held + self._most_resident() - resident, self.held())

    def graphs(self) -> int:
        return 0

    def _most_resident(self) -> int:
        status = (self._own / "status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


def open_memory(device: torch.device) -> DeviceMemory:
    return CudaMemory(device) if device.type == "cuda" else HostMemory()


def free_memory(device: torch.device) -> int:
    """Bytes that it has for whoever asks first, as far as the machine knows."""
    free: int = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free


def cgroup_room(root: Path) -> list[int]:
    """What each limit leaves that the kernel sets to the groups this process is in; cached files that can be dropped
    count as left. Knows both versions of cgroups; where there are none, there is no limit."""
    try:
        groups = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    mounted = root / "sys" / "fs" / "cgroup"
    found: list[int] = []
    for _, kinds, path in (group.split(":", 2) for group in groups):
        if not kinds:
            found += _rooms(mounted, path, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in kinds.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _rooms(mounted / "memory", path, names)
    return found


def _rooms(mounted: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    """Of a group and all above it, up to where the tree is mounted: a container sees no higher than that."""
    group = mounted / path.lstrip("/")
    limit, usage, droppable = names
    for folder in (group, *group.parents):
        if folder != mounted and mounted not in folder.parents:
            return
        with suppress(OSError, ValueError, StopIteration):  # no such group here, or no limit ("max")
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            statistics = (folder / "memory.stat").read_text().splitlines()
            cached = next(int(line.split()[1]) for line in statistics if line.split()[0] == droppable)
            yield max(0, most - used + cached)


class MemoryAccount:
    """What a rank's device memory is for, once its model is loaded."""

    def __init__(self, memory: DeviceMemory, device: str, weights: int, pool: int, work_space: int) -> None:
        """`work_space`: as far as it was looked at before; 0: it was not."""
        self._memory = memory
        self._work_space = work_space
        self._device = device
        self._weights = weights
        self._pool = pool

    def use(self) -> MemoryUse:
        """As it is now; after a warm-up, as it will stay."""
        memory = self._memory
        peak, held, graphs = memory.peak(), memory.held(), memory.graphs()
        return MemoryUse(
            device=self._device,
            total=memory.total,
            weights=self._weights,
            pool=self._pool,
            activations=max(self._work_space, peak - held),
            graphs=graphs,
            runtime=max(0, held - self._weights - self._pool - graphs),
            free=memory.free(),
        )


@contextmanager
def full_is_refused() -> Iterator[None]:
    """What a device has no memory for while an engine starts is a `ConfigError`, with torch's figures."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = " ".join(str(error).split(". If reserved")[0].split())
        raise ConfigError(
            f"the device's memory is full: {words}; lower kv.memory_fraction or kv.pool_tokens, chunk_tokens or "
            "max_running, or spread the model over more ranks (tensor_parallel)"
        ) from error


def _anonymous_bytes() -> int:
    """Resident, and of no file."""
    own = psutil.Process().memory_info()
    return int(own.rss - getattr(own, "shared", 0))

"""Which GPUs each worker of this machine computes on. Pure, but for `visible_gpus`.

A rank has one GPU. The pools' `gpus` say which, or else each worker gets those that the fewest ranks have: so the GPUs
are dealt out in the order of the workers, and when there are more ranks than GPUs, they share them.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec

from cluster.config import DEFAULT_MEMORY_FRACTION, Decode, Device, Prefill, Topology
from cluster.errors import ConfigError
from deploy.launchers.base import ProcessKind
from deploy.launchers.processes import ProcessSpec
from deploy.plan import processes

VARIABLE = "CUDA_VISIBLE_DEVICES"
_DRIVER = "libcuda.so.1"


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """What CUDA shows to a process in this environment, which must be ours; each by the name that `VARIABLE` has."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return []
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    named = environment.get(VARIABLE)
    names = map(str, range(count.value)) if named is None else (name.strip() for name in named.split(","))
    # CUDA itself stops at the first name that it does not know.
    return list(names)[: count.value]


class GpuDealer:
    """Deals `gpus` out to the workers of a topology: to those that it begins with at once, to others when they come.

    Raises `ConfigError` where a worker can't have what it is to have.
    """

    def __init__(self, topology: Topology, gpus: Sequence[str]) -> None:
        self._gpus = gpus
        self._pools: dict[ProcessKind, Prefill | Decode] = {
            ProcessKind.PREFILL: topology.prefill,
            ProcessKind.DECODE: topology.decode,
        }
        for kind, pool in self._pools.items():
            self._check(kind, pool)
        self._dealt: dict[str, tuple[str, ...]] = {}
        workers = [spec for spec in processes(topology) if spec.kind in self._pools]
        # Whoever may choose leaves alone what others have been promised.
        for spec in sorted(workers, key=lambda spec: not self._pools[spec.kind].gpus):
            self.deal(spec)

    def deal(self, worker: ProcessSpec) -> tuple[str, ...]:
        """The GPUs of its ranks, in their order: the same until they are taken back. None for other processes."""
        if worker.kind not in self._pools:
            return ()
        if worker.name not in self._dealt:
            self._dealt[worker.name] = self._choose(worker)
        return self._dealt[worker.name]

    def take_back(self, names: Sequence[str]) -> None:
        """Of workers that have ended."""
        for name in names:
            self._dealt.pop(name, None)

    def variables(self, process: ProcessSpec) -> dict[str, str]:
        """For the environment of a process. Each host of a worker has its part of the worker's, in order."""
        gpus = self.deal(process._replace(name=process.worker))
        share = len(gpus) // process.nodes
        gpus = gpus[process.node * share : (process.node + 1) * share]
        return {VARIABLE: ",".join(gpus)} if gpus else {}

    @property
    def most_shared(self) -> int:
        """Ranks on the GPU that has the most of them."""
        return max(self._ranks_on().values(), default=0)

    def story(self) -> list[str]:
        """Who is where, a line for each GPU in use."""
        workers: dict[str, list[str]] = {}
        for name, gpus in self._dealt.items():
            for gpu in gpus:
                workers.setdefault(gpu, []).append(name)
        lines = []
        for gpu in self._gpus:
            names = workers.get(gpu, [])
            if names:
                lines.append(f"GPU {gpu}: {', '.join(names)}" + (", who share it" if len(names) > 1 else ""))
        return lines

    def _choose(self, worker: ProcessSpec) -> tuple[str, ...]:
        pool = self._pools[worker.kind]
        if pool.gpus:
            index = int(worker.name.rpartition("-")[2])
            return tuple(self._gpus[number] for number in pool.gpus[index % len(pool.gpus)])
        ranks_on = self._ranks_on()
        by_load = sorted(self._gpus, key=lambda gpu: ranks_on[gpu])
        return tuple(by_load[: pool.grid.ranks])

    def _ranks_on(self) -> Counter[str]:
        return Counter(gpu for gpus in self._dealt.values() for gpu in gpus)

    def _check(self, kind: ProcessKind, pool: Prefill | Decode) -> None:
        shown = f"this machine shows {len(self._gpus)}"
        ranks = pool.grid.ranks
        if pool.replicas and ranks > len(self._gpus):
            raise ConfigError(f"{kind.value}: a worker's {ranks} ranks want a GPU each, and {shown}")
        for index, numbers in enumerate(pool.gpus):
            for number in numbers:
                if number >= len(self._gpus):
                    raise ConfigError(f"{kind.value}.gpus[{index}]: there is no GPU {number}: {shown}, counted from 0")


def deal_gpus(topology: Topology, gpus: Sequence[str]) -> GpuDealer | None:
    """None for workers that compute on the CPU. Raises `ConfigError` if there are too few for them."""
    device = topology.model.device
    if device is Device.CPU or (device is Device.AUTO and not gpus):
        return None
    if not gpus:
        raise ConfigError("model.device: cuda, and this machine shows no NVIDIA GPU")
    return GpuDealer(topology, gpus)


def share_memory(topology: Topology, dealer: GpuDealer) -> Topology:
    """Where workers share a GPU, they share its memory, unless the topology says what each of them takes. Raises
    `ConfigError` if that is more than there is."""
    kv = topology.kv
    if kv.memory_fraction is not None and kv.memory_fraction * dealer.most_shared > 1:
        raise ConfigError(
            f"kv.memory_fraction: {kv.memory_fraction:g} for each of {dealer.most_shared} ranks that share a GPU is "
            "more than all of its memory"
        )
    if dealer.most_shared < 2 or kv.memory_fraction is not None or kv.pool_tokens is not None:
        return topology
    share = round(DEFAULT_MEMORY_FRACTION / dealer.most_shared, 3)
    return msgspec.structs.replace(topology, kv=msgspec.structs.replace(kv, memory_fraction=share))


def memory_note(topology: Topology) -> str:
    """What each of them takes, in a line."""
    kv = topology.kv
    if kv.memory_fraction is None and kv.pool_tokens is not None:
        return f"each rank takes of its GPU what its part of the model and a pool of {kv.pool_tokens:,} tokens need"
    return (
        f"each rank takes {kv.memory_fraction or DEFAULT_MEMORY_FRACTION:.1%} of its GPU's memory (kv.memory_fraction)"
    )

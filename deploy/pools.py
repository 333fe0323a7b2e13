"""How many workers a pool may have, and which of them come and go when that changes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cluster.config import Topology
from cluster.errors import ConfigError
from cluster.messages import Role
from deploy.launchers.base import Sizes


class Change(NamedTuple):
    """What brings one pool to its size."""

    start: list[int]
    """Indices of new workers."""
    retire: list[str]
    """Names, youngest first."""


def parse_sizes(words: Sequence[str]) -> dict[Role, int]:
    """What `baton scale decode=4 prefill=2` means. Raises `ConfigError`."""
    sizes: dict[Role, int] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in {role.value for role in Role} or not text.isdecimal():
            raise ConfigError(f"{word}: expected POOL=WORKERS, such as decode=4; the pools are prefill and decode")
        if Role(name) in sizes:
            raise ConfigError(f"{word}: the {name} pool is named twice")
        sizes[Role(name)] = int(text)
    return sizes


def require_sizes(topology: Topology, sizes: Sizes) -> None:
    """Raises `ConfigError` for a size with which this cluster could not serve, or would be another kind of cluster."""
    for role, size in sizes.items():
        if topology.unified and role is Role.PREFILL:
            if size > 0:
                raise ConfigError(
                    f"prefill={size}: the decode workers of this cluster prefill by themselves (prefill.replicas: 0) "
                    "and take no handoffs; a cluster with two pools is started as one"
                )
        elif size < 1:
            raise ConfigError(f"{role.value}={size}: without a {role.value} worker nothing is served; the least is 1")


def change(role: Role, present: Sequence[str], taken: Sequence[str], size: int) -> Change:
    """`present`: the pool's workers that stay unless they are retired, oldest first; `taken`: names that can't be given
    to new ones, because who has them still drains."""
    names = {*present, *taken}
    free = (index for index in range(len(names) + size) if f"{role.value}-{index}" not in names)
    start = [next(free) for _ in range(size - len(present))]
    return Change(start, list(reversed(present[size:])))

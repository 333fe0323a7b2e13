"""One workload played on one server that is up, and what its processes cost meanwhile."""

from __future__ import annotations

import os
from typing import NamedTuple

from bench.client import CompletionClient
from bench.load import LoadGenerator, Observed
from bench.processes import ProcessTree, busy_seconds, own_seconds
from bench.standstill import Standstills, Witness
from bench.workload import Prompts, Workload


class Trial(NamedTuple):
    observed: Observed
    cpu_seconds: dict[str, float]
    """Spent in the window, by member of the tree."""
    others_share: float
    """Of the cores' time in the window, what went to processes that take no part."""
    memory_bytes: int
    """Of the whole tree at the window's end, under load; what its processes share counts once."""
    standstills: Standstills | None
    """Of the machine; None where nobody can tell."""


class _Edge(NamedTuple):
    members: dict[str, float]
    others: float
    memory_bytes: int


async def play(workload: Workload, client: CompletionClient, prompts: Prompts, tree: ProcessTree) -> Trial:
    """Plays `workload` by `client` on the server whose processes are `tree`, and looks at both edges of the window."""
    cores = os.sched_getaffinity(0)
    edges: dict[str, _Edge] = {}

    def mark(edge: str) -> None:
        members = tree.cpu_seconds()
        others = busy_seconds(cores) - sum(members.values()) - own_seconds()
        edges[edge] = _Edge(members, others, tree.proportional_bytes())

    with Witness() as witness:
        observed = await LoadGenerator(workload, client, prompts).run(mark)
    start, end = edges["start"], edges["end"]
    return Trial(
        observed,
        {name: seconds - start.members.get(name, 0.0) for name, seconds in end.members.items()},
        (end.others - start.others) / (observed.seconds * len(cores)),
        end.memory_bytes,
        witness.standstills,
    )

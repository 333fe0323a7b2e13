"""Who is measured: clusters that use the same two cores, each in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parent.parent
TOPOLOGIES = REPOSITORY / "deploy" / "topologies"
RESULTS = REPOSITORY / "bench" / "results"
SPLIT = TOPOLOGIES / "demo.yaml"
UNIFIED = TOPOLOGIES / "unified.yaml"

CHUNK_TOKENS = (64, 128, 256, 512)
"""Chunk sizes that are tried for a unified cluster."""
BREAK_EVEN = "flexible: the decode worker prefills, too, where that delays everybody less (router.break_even)"
NAMES = "unified WxC/T: W workers with C cores each that prefill in chunks of T tokens"


class Contender(NamedTuple):
    """A cluster that takes part."""

    name: str
    topology: Path
    settings: Sequence[str] = ()

    @property
    def label(self) -> str:
        """The name as a part of a file's name."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)


def split(settings: Sequence[str] = ()) -> Contender:
    """One prefill and one decode worker, with a core each."""
    return Contender("1P1D", SPLIT, settings)


def flexible(contender: Contender) -> Contender:
    """The same split cluster, which may prefill where it decodes; gaps may grow for it within the objective."""
    settings = ("router.break_even.enabled=true", "router.break_even.delay_weight=0.2", *contender.settings)
    return Contender(f"{contender.name} flexible", contender.topology, settings)


def unified_shapes(settings: Sequence[str] = ()) -> list[Contender]:
    """The two ways to use two cores without splitting the phases; in all they have as much KV memory as `split`."""
    twins = ("decode.replicas=2", "decode.cpus=[[0],[1]]", "kv.pool_tokens=65536")
    return [
        Contender("unified 1x2", UNIFIED, settings),
        Contender("unified 2x1", UNIFIED, (*twins, *settings)),
    ]


def chunked(contender: Contender, tokens: int) -> Contender:
    """The same unified cluster with another chunk size."""
    settings = (*contender.settings, f"decode.chunk_tokens={tokens}")
    return Contender(f"{contender.name}/{tokens}", contender.topology, settings)


def named(topology: Path, settings: Sequence[str] = ()) -> Contender:
    """Any topology, as it is."""
    return split(settings) if topology == SPLIT else Contender(topology.stem, topology, settings)

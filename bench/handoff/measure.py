"""Handoffs in a real cluster, beside a bare loop over the same transfer engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench.alone import Alone, Asked, cores_of
from bench.cluster import Cluster
from bench.contenders import SPLIT
from bench.handoff.bare import Start, measure_bare
from bench.statistics import Repeated
from bench.workload import Prompts
from cluster.config import Topology, TransferName
from cluster.errors import LaunchError
from cluster.timings import HandoffTimings, PrefillTimings
from cluster.topology import load_topology

POOL_PROMPTS = 8
"""A pool holds so many prompts, so that after as many handoffs all its pages have been written before: else the
kernel's work of giving memory would be measured."""
TOKENS = 2
"""Of each answer: with one, nothing is handed over."""
ROUNDS = 3
"""Handoffs and bare writes take turns."""
_GIGA = 1e9


class Bandwidth(msgspec.Struct, frozen=True):
    """Equal pages in equal batches, 10^9 bytes a second, over handoffs."""

    pages: int
    page_bytes: int
    batches: int
    baton: Repeated
    """By the time with a write under way, as the request's record has it."""
    bare: Repeated

    @property
    def ratio(self) -> float:
        return self.baton.median / self.bare.median


class Exposed(msgspec.Struct, frozen=True):
    """What a request that nobody disturbs notices of its handoff."""

    chunk_tokens: int
    prefill_seconds: Repeated
    exposed_seconds: Repeated
    """From the last chunk's end until decode has taken over, and the way of its word back."""
    tail_seconds: Repeated
    """The part of it until the last page had gone out."""
    share: Repeated
    """Exposed over prefill, of each request."""


class Handed(msgspec.Struct, frozen=True):
    """One transfer engine."""

    transfer: TransferName
    prompt_tokens: int
    whole: Bandwidth
    """All pages in one batch, after the prompt was computed."""
    exposed: Exposed
    """With the topology's own chunks: pages go out while the next chunk computes."""


def measure_handoff(
    transfer: TransferName,
    prompt_tokens: int,
    repeats: int,
    seed: int,
    settings: Sequence[str],
    log_dir: Path,
    tell: Callable[[str], None],
) -> Handed:
    """Raises `LaunchError`, `ConfigError`."""
    settings = (
        *settings,
        f"kv.transfer={transfer.value}",
        f"kv.pool_tokens={POOL_PROMPTS * (prompt_tokens + TOKENS)}",
    )
    whole = _bandwidth((*settings, f"prefill.chunk_tokens={prompt_tokens}"), prompt_tokens, repeats, seed, log_dir)
    tell(f"{transfer.value}: {whole.baton.median:.2f} GB/s, bare {whole.bare.median:.2f} GB/s")
    exposed = measure_exposed(settings, prompt_tokens, repeats, seed, log_dir)
    tell(f"{transfer.value}: exposed {exposed.share.median:.1%} of prefill's time")
    return Handed(transfer, prompt_tokens, whole, exposed)


def _bandwidth(settings: Sequence[str], prompt_tokens: int, repeats: int, seed: int, log_dir: Path) -> Bandwidth:
    topology = load_topology(SPLIT, settings)
    baton, bare = [], []
    with Cluster(SPLIT, settings, log_dir / f"{topology.kv.transfer.value}-whole") as cluster:
        handoffs = _Handoffs(cluster, prompt_tokens, seed)
        # Settings of the transfer engine and where its libraries are: as the worker's own process has them.
        environment = cluster.tree.environment("prefill-0")
        for number in range(ROUNDS):
            found = [handoff for _, handoff in handoffs.run(-(-repeats // ROUNDS))]
            baton += [each.bytes / each.write_seconds / _GIGA for each in found]
            middle = found[-1]
            page_bytes, batches = middle.bytes // middle.pages, split_evenly(middle.pages, middle.batches)
            writer, reader = _ends(topology, page_bytes)
            taken = measure_bare(writer, reader, batches, -(-repeats // ROUNDS), environment, seed + number)
            bare += [middle.bytes / seconds / _GIGA for seconds in taken]
    return Bandwidth(middle.pages, page_bytes, middle.batches, Repeated.over(baton), Repeated.over(bare))


def measure_exposed(settings: Sequence[str], prompt_tokens: int, repeats: int, seed: int, log_dir: Path) -> Exposed:
    """On a cluster of the topology's own chunks. Raises `LaunchError`, `ConfigError`."""
    topology = load_topology(SPLIT, settings)
    with Cluster(SPLIT, settings, log_dir / f"{topology.kv.transfer.value}-chunks") as cluster:
        found = _Handoffs(cluster, prompt_tokens, seed).run(repeats)
    return Exposed(
        chunk_tokens=topology.prefill.chunk_tokens,
        prefill_seconds=Repeated.over([prefill.compute_seconds for prefill, _ in found]),
        exposed_seconds=Repeated.over([handoff.exposed_seconds for _, handoff in found]),
        tail_seconds=Repeated.over([handoff.tail_seconds for _, handoff in found]),
        share=Repeated.over([handoff.exposed_seconds / prefill.compute_seconds for prefill, handoff in found]),
    )


class _Handoffs:
    """One request after the other, no two prompts alike, on a cluster whose pools have been used all over."""

    def __init__(self, cluster: Cluster, prompt_tokens: int, seed: int) -> None:
        self._alone = Alone(cluster)
        self._prompts = Prompts(seed, self._alone.vocab_size)
        self._prompt_tokens = prompt_tokens
        self._number = 0
        self.run(POOL_PROMPTS + 1)

    def run(self, count: int) -> list[tuple[PrefillTimings, HandoffTimings]]:
        """Raises `LaunchError` for a request without a handoff."""
        found = []
        for _ in range(count):
            prompt = self._prompts.prompt("handoff", self._number, self._prompt_tokens)
            self._number += 1
            _, record = self._alone.ask_for_record(Asked(prompt, TOKENS))
            if record.prefill is None or record.handoff is None or not record.handoff.write_seconds:
                raise LaunchError(f"no handoff in the record of a request: {record}")
            found.append((record.prefill, record.handoff))
        return found


def _ends(topology: Topology, page_bytes: int) -> tuple[Start, Start]:
    """Pools as large as the workers', on their cores."""
    transfer, pages = topology.kv.transfer, topology.pool_pages
    writer = Start(transfer, pages, page_bytes, cores_of(topology.prefill.cpus))
    return writer, Start(transfer, pages, page_bytes, cores_of(topology.decode.cpus))


def split_evenly(pages: int, batches: int) -> list[int]:
    """So many batches, as even as can be."""
    return [pages * (index + 1) // batches - pages * index // batches for index in range(batches)]

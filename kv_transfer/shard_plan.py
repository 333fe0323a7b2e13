"""Who writes what to whom where prefill and decode worker are divided differently: pure integers.

A page's heads are neighbours in memory (`cluster.layout`), so what one rank writes to another is one range of each
page, the same of every page: a `Part`. Every rank of the decode worker gets each of its heads from exactly one rank of
the prefill worker; where several have it, they take turns, so that none writes for all.
"""

from __future__ import annotations

from typing import NamedTuple

from cluster.layout import KVLayout
from cluster.shards import holders, key_value_heads


class PageSlice(NamedTuple):
    """`size` bytes of each page: from byte `ours` of our page, to byte `theirs` of the peer's."""

    ours: int
    theirs: int
    size: int


class Part(NamedTuple):
    """What rank `source` of the writer sends of each page to rank `target` of the receiver."""

    source: int
    target: int
    slice: PageSlice
    """Ours is the writer's."""


def parts_of(layout: KVLayout, sources: int, targets: int) -> list[Part]:
    """Of a handoff between a writer of `sources` ranks and a receiver of `targets`, sorted by target, then by place.

    Each byte of each target rank's page is in exactly one part.
    """
    return [part for target in range(targets) for part in _parts_to(target, layout, sources, targets)]


def _parts_to(target: int, layout: KVLayout, sources: int, targets: int) -> list[Part]:
    """Neighbouring heads of the same writer go together."""
    heads, size = layout.kv_heads, layout.head_bytes
    own = key_value_heads(heads, targets, target)
    parts: list[Part] = []
    for head in own:
        writers = holders(heads, sources, head)
        source = writers[holders(heads, targets, head).index(target) % len(writers)]
        if parts and parts[-1].source == source:
            begun = parts[-1].slice
            parts[-1] = Part(source, target, begun._replace(size=begun.size + size))
        else:
            first = key_value_heads(heads, sources, source).start
            parts.append(Part(source, target, PageSlice((head - first) * size, (head - own.start) * size, size)))
    return parts

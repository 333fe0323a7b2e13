"""The shape in which a worker holds KV cache, and its fingerprint.

One page holds all layers of `page_size` consecutive tokens, contiguously:

    [kv_heads, layers, 2 (K then V), page_size, head_dim]      of `dtype`

so that a page is one range of bytes, and so is any range of its heads: one descriptor of a transfer engine, one
digest. The pool is `pages` of these in a row. Of a worker whose model is spread over several ranks, each has a pool of
its own, with its heads and its layers of each page (`cluster.shards`). Two workers can hand over to each other when
their fingerprints are equal; how they are divided does not matter.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from msgspec import Meta

from cluster.errors import LayoutMismatch
from cluster.shards import Grid, key_value_heads, layers_of

SCHEMA_VERSION = 2
"""Version of the messages and of the page format; both ends of a connection must have the same."""

Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


class KVLayout(msgspec.Struct, frozen=True):
    """What two workers must agree on to exchange pages, all but `shards` and `stages`: among how many ranks heads and
    layers are divided. `model` is a digest of the weights' identity, not a path."""

    model: str
    dtype: str
    page_size: Positive
    layers: Positive
    kv_heads: Positive
    head_dim: Positive
    shards: Positive = 1
    stages: Positive = 1
    digest: str = "xxh3_64"
    version: int = SCHEMA_VERSION

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all heads and layers, K and V."""
        return self.token_bytes * self.page_size

    @property
    def head_bytes(self) -> int:
        """Bytes of one head's part of a page."""
        return self.page_bytes // self.kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes of KV that one token occupies."""
        return self.layers * 2 * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    def pages_for(self, tokens: int) -> int:
        """Pages that `tokens` tokens occupy."""
        return -(-tokens // self.page_size)

    @property
    def grid(self) -> Grid:
        return Grid(self.shards, self.stages)

    def of_rank(self, rank: int) -> KVLayout:
        """Of one rank's own pool: its heads and layers, undivided."""
        heads = key_value_heads(self.kv_heads, self.shards, self.grid.shard_of(rank))
        layers = layers_of(self.layers, self.stages, self.grid.stage_of(rank))
        return msgspec.structs.replace(self, layers=len(layers), kv_heads=len(heads), shards=1, stages=1)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that are equal exactly when pages can be exchanged."""
        return hashlib.sha256(msgspec.json.encode(self._undivided)).hexdigest()[:16]

    @property
    def _undivided(self) -> KVLayout:
        return msgspec.structs.replace(self, shards=1, stages=1)

    def require_compatible(self, other: KVLayout, *, ours: str, theirs: str) -> None:
        """Raises `LayoutMismatch`, with both layouts and the fields that differ, unless pages can be exchanged."""
        if self._undivided == other._undivided:
            return
        mine, its = msgspec.to_builtins(self), msgspec.to_builtins(other)
        differing = ", ".join(f"{key}: {mine[key]} != {its[key]}" for key in mine if mine[key] != its[key])
        raise LayoutMismatch(f"KV layouts differ ({differing}); {ours} has {mine}, {theirs} has {its}")

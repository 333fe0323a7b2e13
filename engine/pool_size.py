"""How many pages the KV pool gets: as many as asked for, or as a fraction of the device's memory leaves.

For the latter the model computes the largest step that there can be, over a pool of one page, and the memory that it
takes meanwhile is looked at. (As vLLM does it: gpu_memory_utilization.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cluster.config import DEFAULT_MEMORY_FRACTION, DEFAULT_POOL_TOKENS
from cluster.errors import ConfigError
from cluster.messages import Fence, Sampling
from engine.batch import build_step
from engine.decoder import Decoder
from engine.device_memory import GIB, DeviceMemory
from engine.engine_config import EngineConfig
from engine.group import Group
from engine.scheduler import Chunk
from engine.sequence import Sequence

PROFILED_PAGES = 1
TRIAL_PAGES = 1
"""Pages of the pool's memory that no ledger gives out: transfer connections are tried on the last page."""
NESTED_STEPS = 2
"""A step may be computed between two layers of another, with buffers of its own."""
SAMPLER_COPIES = 8
"""Of float32 logits, at most: they, their probabilities, what a filter leaves and looks for, and sums in float64."""
FLOAT_BYTES = 4
_PROFILED = Fence("profile", 0, 0, 0)


class Room(NamedTuple):
    pages: int
    """That fit beside all else, `TRIAL_PAGES` included."""
    work_space: int
    """Bytes that steps may take."""


def pages_asked_for(config: EngineConfig) -> int:
    """Where no fraction decides."""
    return config.pool_pages or -(-DEFAULT_POOL_TOKENS // config.page_size)


def fraction_of(config: EngineConfig, device: torch.device) -> float | None:
    """What decides about the pool's size. None: `pages_asked_for`."""
    by_default = DEFAULT_MEMORY_FRACTION if device.type == "cuda" and config.pool_pages is None else None
    return by_default if config.memory_fraction is None else config.memory_fraction


def room_left(memory: DeviceMemory, fraction: float, page_bytes: int, decoder: Decoder, largest: LargestStep) -> Room:
    """This rank's. The decoder's cache has `PROFILED_PAGES`. Raises `ConfigError` if there is not room for one page."""
    before = memory.held()
    memory.watch()
    largest.compute(decoder)
    work_space = NESTED_STEPS * max(0, memory.peak() - before) + largest.sampler_bytes
    budget = int(fraction * memory.total)
    pages = (budget - before - work_space) // page_bytes
    if pages <= TRIAL_PAGES:
        raise ConfigError(
            f"kv.memory_fraction: {fraction:g} of {_gib(memory.total)} are {_gib(budget)}; weights and libraries take "
            f"{_gib(before)}, a step of {largest.rows} tokens {_gib(work_space)}: no page of {page_bytes:,} bytes is "
            "left. Raise it, lower chunk_tokens or max_running, or spread the model over more ranks"
        )
    return Room(pages, work_space)


class LargestStep:
    """All the prompt tokens that a step may have, at a context's end, beside as many decodes as there may be."""

    def __init__(self, config: EngineConfig, context: int, vocabulary: int) -> None:
        self._chunk = min(config.chunk_tokens, context)
        self._decodes = config.max_running - 1
        self._context = context
        self._page_size = config.page_size
        self.rows = self._chunk + self._decodes
        self.sampler_bytes = config.max_running * vocabulary * FLOAT_BYTES * SAMPLER_COPIES

    def compute(self, decoder: Decoder) -> None:
        """On each rank at the same time."""
        prompt = self._chunk_of(self._context, self._chunk)
        decodes = [self._chunk_of(self._page_size, 1) for _ in range(self._decodes)]
        with torch.inference_mode():
            decoder.forward(build_step([*decodes, prompt]))

    def _chunk_of(self, length: int, tokens: int) -> Chunk:
        """The last tokens of a sequence, all of whose pages are the first one."""
        sequence = Sequence(_PROFILED, [0] * length, [], Sampling(max_tokens=1, seed=0))
        sequence.pages = [0] * -(-length // self._page_size)
        return Chunk(sequence, length - tokens, length)


def least_of_all(pages: int, everyone: Group | None, device: torch.device) -> int:
    """The smallest rank's: a page has a part on each of them."""
    if everyone is None:
        return pages
    counts = torch.zeros(everyone.size, dtype=torch.float64, device=device)
    counts[everyone.rank] = pages
    everyone.add_up(counts)
    return int(counts.min().item())


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"

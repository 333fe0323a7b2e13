"""Digests of pages that the host can't read: computed by the device that has them, beside the steps.

Each word of a page is multiplied by a number of its place, folded, and multiplied by another; the sum of all is the
digest. One word that is not what it was changes it for certain; that several add up to what they were has a chance of
about one in 2^64. Integers wrap alike on all devices, so pages have the same digest everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from engine.kv_cache import KVCache

BYTES_AT_ONCE = 16 << 20
"""Of pages; what is computed of them takes three times as much for a moment."""
UNIT = torch.int32
"""Bytes of a page divide into these: it has keys and values, of heads whose size is even."""
_HALF = 32
_LOW_HALF = (1 << _HALF) - 1
_UNSIGNED = (1 << 64) - 1


class ByteRuns(Protocol):
    """Bytes of a page: `times` runs of `size`, the first from byte `first` on, each further one `stride` behind it."""

    @property
    def first(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def times(self) -> int: ...
    @property
    def stride(self) -> int: ...


class DevicePageDigests:
    """Of pages of one cache. Called from the transfer thread, which it holds up, and not the step loop: on a GPU it has
    a queue of its own, and whoever asks knows that the pages are written."""

    on_host = False

    def __init__(self, cache: KVCache) -> None:
        self._pages = cache.pages
        self._page_bytes = cache.page_bytes
        self._units = cache.pool.view(-1).view(UNIT)
        self._stream = _new_queue(cache.pool.device)
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}
        """By number of words."""

    def of(self, pages: Sequence[int], runs: ByteRuns | None = None) -> list[int]:
        """One unsigned 64-bit number per page, in order, of these bytes of it; None: of all. Raises `ValueError` for a
        page outside the pool."""
        for page in pages:
            if not 0 <= page < self._pages:
                raise ValueError(f"page {page} is not in the pool of {self._pages} pages")
        if not pages:
            return []
        with torch.inference_mode(), self._beside_steps():
            found = [self._digest(part).cpu() for part in self._parts(pages, runs)]
        return [digest & _UNSIGNED for digest in torch.cat(found).tolist()]

    def _parts(self, pages: Sequence[int], runs: ByteRuns | None) -> Iterator[Tensor]:
        """Words of some pages at a time, [pages, words]."""
        item = UNIT.itemsize
        first, size, times, stride = (
            (0, self._page_bytes, 1, 0) if runs is None else (runs.first, runs.size, runs.times, runs.stride)
        )
        shape = (self._pages, times, size // item)
        begin = self._units.storage_offset() + first // item
        every = self._units.as_strided(shape, (self._page_bytes // item, stride // item, 1), begin)
        together = max(1, BYTES_AT_ONCE // (size * times))
        for number in range(0, len(pages), together):
            index = torch.tensor(pages[number : number + together], device=every.device)
            units = every.index_select(0, index).view(len(index), -1)
            yield units.view(torch.int64) if units.shape[1] % 2 == 0 else units.long()

    def _digest(self, words: Tensor) -> Tensor:
        """int64 [pages]"""
        count = words.shape[1]
        if count not in self._factors:
            self._factors[count] = _factors(count, words.device)
        inner, outer = self._factors[count]
        mixed = words * inner
        mixed ^= (mixed >> _HALF) & _LOW_HALF
        return mixed.mul_(outer).sum(1)

    @contextmanager
    def _beside_steps(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield


def device_digests(cache: KVCache) -> DevicePageDigests | None:
    """None where the host reads the pages itself."""
    return None if cache.pool.device.type == "cpu" else DevicePageDigests(cache)


def _new_queue(device: torch.device) -> torch.cuda.Stream | None:
    """None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _factors(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two odd numbers for each place, the same everywhere: those of splitmix64 (Steele, Lea and Flood)."""
    state = torch.arange(1, 2 * count + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ _shifted(state, shift)) * _signed(factor)
    odd = (state ^ _shifted(state, 31)) | 1
    return odd[:count], odd[count:]


def _shifted(values: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 of these bits."""
    return value - (1 << 64) if value >> 63 else value

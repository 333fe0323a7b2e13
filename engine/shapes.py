"""Which sizes a step's tensors may have: few, so that what is made per size is soon made. Pure.

oneDNN compiles a kernel for each size it meets, about a millisecond and half a megabyte each, and keeps it (CUDA graphs
will be like that too). Left alone, batches and prompts have thousands of sizes: the memory of a worker would grow for
hours, and steps would wait for compilers. Rounded up, they have some dozens, for padding of at most an eighth.
"""

from __future__ import annotations

from collections.abc import Iterator

ROWS = 2
"""Least step of rows of a product. A single row would be summed in another order than rows of a batch."""


def rounded(size: int, least: int) -> int:
    """`size` or the next one of a series with eight steps per doubling, which are at least `least` wide."""
    step = max(least, 1 << max(0, (size - 1).bit_length() - 4))
    return -(-size // step) * step


def series(largest: int, least: int) -> Iterator[int]:
    """Everything that `rounded` returns for 1 to `largest`, ascending."""
    size = 0
    while size < largest:
        size = rounded(size + 1, least)
        yield size

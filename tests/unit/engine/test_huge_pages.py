"""Memory for tensors that stay."""

from __future__ import annotations

import ctypes

import pytest
import torch

from engine.huge_pages import HUGE_PAGE, Arena


def test_tensors_lie_side_by_side_and_keep_their_values():
    first, second = torch.arange(10.0), torch.arange(6, dtype=torch.int64).view(2, 3).T
    arena = Arena(Arena.padded(first.nbytes) + Arena.padded(second.nbytes))
    at, then = arena.place(first), arena.place(second)
    assert at % HUGE_PAGE == 0
    assert then == at + 64
    assert list((ctypes.c_float * 10).from_address(at)) == first.tolist()
    assert list((ctypes.c_int64 * 6).from_address(then)) == [0, 3, 1, 4, 2, 5]


def test_a_tensor_without_room_is_refused():
    arena = Arena(64)
    with pytest.raises(ValueError, match="no room for"):
        arena.place(torch.zeros(2 * HUGE_PAGE, dtype=torch.uint8))

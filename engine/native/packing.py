"""Weights in the order in which the kernels read them: panels of 16 outputs, see product.h."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

LANES = 16
WORD_BYTES = 4


def packed_bytes(outputs: int, inputs: int, item_bytes: int) -> int:
    """Of a packed weight."""
    return -(-outputs // LANES) * LANES * inputs * item_bytes


def packed(weight: Tensor) -> Tensor:
    """[outputs, inputs] -> [panels, words, 16, values per word], zeros behind the last output."""
    per_word = WORD_BYTES // weight.element_size()
    rows = functional.pad(weight, (0, 0, 0, -len(weight) % LANES))
    panels = rows.view(len(rows) // LANES, LANES, weight.shape[1] // per_word, per_word)
    return panels.permute(0, 2, 1, 3).contiguous()


def packed_pairs(fused: Tensor) -> Tensor:
    """The first and second half of the outputs, in panels that take turns: [panels, 2, words, 16, values per word]."""
    return torch.stack([packed(half) for half in fused.chunk(2)], 1)


def paired_bias(fused: Tensor) -> Tensor:
    """The bias of `packed_pairs`: [panels, 2, 16]."""
    halves = fused.view(2, -1)
    padded = functional.pad(halves, (0, -halves.shape[1] % LANES))
    return padded.view(2, -1, LANES).transpose(0, 1).contiguous()

"""Endless harmless prose from a seed: natural enough that a small model is sure of what comes next."""

from __future__ import annotations

import random

_WHO = (
    "The old captain",
    "A young engineer",
    "My neighbour",
    "The librarian",
    "Our teacher",
    "The baker of the village",
)
_DID = ("repaired", "described", "carried", "remembered", "painted", "measured", "lost and found")
_WHAT = ("the wooden bridge", "a map of the islands", "the broken clock", "an unusual letter", "the lighthouse")
_WHERE = (
    "near the harbour",
    "behind the school",
    "in the mountains",
    "on the other side of the river",
    "at the station",
)
_WHEN = ("in the spring of 1912", "before breakfast", "on a rainy Tuesday", "for 25 years", "when the snow melted")
_WHY = (
    "because nobody else wanted to",
    "and told everyone about it",
    "while the children were watching",
    "although it cost 300 dollars",
    "so that the trains could run again",
)


def prose(seed: int, sentences: int) -> str:
    """The same text for the same arguments, on every Python."""
    draw = random.Random(seed)
    parts = (_WHO, _DID, _WHAT, _WHERE, _WHEN, _WHY)
    return " ".join(" ".join(part[int(draw.random() * len(part))] for part in parts) + "." for _ in range(sentences))

"""The bytes that each token stands for.

Decoders of the two families that we run are, token by token, a mapping to bytes: so text can be made incrementally, and
exactly, by joining bytes. Other decoders (that look at neighbours) are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

from cluster.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


class TokenTable:
    """id -> bytes, for all ids; ids beyond the tokenizer (a padded vocabulary) stand for nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `ModelError` for a decoder that is no mapping of single tokens."""
        description: dict[str, Any] = json.loads(tokenizer.to_str())
        to_bytes, self.strips_leading_space = _decoder(description.get("decoder"))
        tokens = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
        self._bytes = [to_bytes(tokens[number]) if number in tokens else b"" for number in range(max(tokens) + 1)]
        self.special = frozenset(token["id"] for token in description["added_tokens"] if token["special"])
        """Ids that are never part of the text."""

    def __len__(self) -> int:
        return len(self._bytes)

    def bytes_of(self, token: int) -> bytes:
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""


def _decoder(description: dict[str, Any] | None) -> tuple[Callable[[str], bytes], bool]:
    """How a token becomes bytes, and whether the decoder strips one space at the very beginning."""
    parts = _flatten(description)
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        return _byte_level(), False
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        strips = any(part["type"] == "Strip" and part.get("start", 0) > 0 for part in parts)
        strips |= any(part["type"] == "Metaspace" and part.get("prepend_scheme") != "never" for part in parts)
        return _sentencepiece, strips
    raise ModelError(f"the tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) is not supported: "
                     "supported are ByteLevel and SentencePiece's")  # fmt: skip


def _flatten(description: dict[str, Any] | None) -> list[dict[str, Any]]:
    if description is None:
        return []
    if description["type"] == "Sequence":
        return [part for inner in description["decoders"] for part in _flatten(inner)]
    return [description]


def _byte_level() -> Callable[[str], bytes]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet |= {chr(0x100 + rank): byte for rank, byte in enumerate(others)}

    def to_bytes(token: str) -> bytes:
        # Added tokens are written in plain text: one with a character outside the alphabet stands for itself.
        values = [alphabet.get(character, -1) for character in token]
        return token.encode() if -1 in values else bytes(values)

    return to_bytes


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()

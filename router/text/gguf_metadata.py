"""The metadata of a GGUF file: tokenizer, chat template and sizes, without touching the weights.

The router needs a few arrays out of a file of many gigabytes and must not load a weights library for them; the `gguf`
package's reader, which describes every element of every array, takes seconds for a vocabulary. Format: GGUF versions 2
and 3, little-endian, as specified in ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from pathlib import Path
from typing import Any

from cluster.errors import ModelError

_STRING = 8
_ARRAY = 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's type numbers of fixed size, as codes of `struct`."""


def read_metadata(path: Path) -> dict[str, Any]:
    """All keys and values. Raises `ModelError` for a file that is not GGUF or is cut off."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path).read()
    except (OSError, ValueError) as error:  # ValueError: an empty file can't be mapped
        raise ModelError(f"{path} can't be read: {error}") from error
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is damaged: its metadata ends early or makes no sense ({error})") from error


class _Reader:
    """A cursor over the mapped file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 0

    def read(self) -> dict[str, Any]:
        if self._data[:4] != b"GGUF":
            raise ModelError(f"{self._path} is not a GGUF file")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ModelError(f"{self._path} has GGUF version {version}; supported: 2 and 3, little-endian")
        self._scalar("Q")  # number of tensors
        return {self._string(): self._value(self._scalar("I")) for _ in range(self._scalar("Q"))}

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        code = _SCALARS.get(kind)
        if code is None:
            raise ModelError(f"{self._path} is damaged: metadata of unknown type {kind}")
        return self._scalar(code)

    def _array(self) -> list[Any]:
        kind, length = self._scalar("I"), self._scalar("Q")
        code = _SCALARS.get(kind)
        if code is None or code == "?":
            return [self._value(kind) for _ in range(length)]
        size = struct.calcsize(f"<{code}") * length
        values = array(code)
        values.frombytes(self._take(size))
        return values.tolist()

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode()

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise IndexError(f"{size} bytes expected at {self._at}")
        taken = self._data[self._at : end]
        self._at = end
        return taken

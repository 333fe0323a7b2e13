"""Prompts that are the same tokens whether a server is given ids or text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from cluster.errors import ConfigError

WORD = re.compile(r" [a-z]{2,12}")


class Words:
    """The tokens of a vocabulary that are one whole word with the space before it.

    Tokenizers of the byte-level BPE kind never join over such a space: any row of these words is read as these very
    tokens. `Prompts` draws from `ids`.
    """

    def __init__(self, vocab_size: int, texts: Mapping[int, str]) -> None:
        self.vocab_size = vocab_size
        self._texts = dict(texts)

    @property
    def ids(self) -> Sequence[int]:
        return sorted(self._texts)

    def text(self, ids: Sequence[int]) -> str:
        """Raises `KeyError` for an id that is no word."""
        return "".join(self._texts[each] for each in ids)


def words_of(tokenizer_file: Path) -> Words:
    """Those of a tokenizer.json that it reads back as one token. Raises `ConfigError` if the file is not there."""
    if not tokenizer_file.is_file():
        raise ConfigError(f"there is no {tokenizer_file}; run `make peers`")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    texts = {each: tokenizer.decode([each]) for each in tokenizer.get_vocab().values()}
    candidates = [each for each, text in texts.items() if WORD.fullmatch(text)]
    read = tokenizer.encode_batch([texts[each] for each in candidates], add_special_tokens=False)
    kept = [each for each, found in zip(candidates, read, strict=True) if found.ids == [each]]
    return Words(len(texts), {each: texts[each] for each in kept})

"""Text from tokens, one at a time."""

from __future__ import annotations

import codecs

from router.text.token_table import TokenTable


class IncrementalDetokenizer:
    """Joins the bytes of tokens and gives out whole characters only; a push costs O(bytes of the token).

    What `push` has returned so far is a prefix of the tokenizer's `decode` of all tokens; with `flush` it is all of it.
    (SentencePiece's decoder turns a whole run with an invalid byte into U+FFFD; ours only what is invalid.)
    """

    def __init__(self, table: TokenTable, *, strip_leading_space: bool = True) -> None:
        """`strip_leading_space`: the text stands for itself (chat) and does not continue a prompt (completion)."""
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strip_leading_space and table.strips_leading_space

    def push(self, token: int) -> str:
        """The characters that `token` completes. Special tokens have no text."""
        if token in self._table.special:
            return ""
        data = self._table.bytes_of(token)
        if self._strip and data:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._decoder.decode(data)

    def flush(self) -> str:
        """At the end: U+FFFD if a character was begun and never completed."""
        return self._decoder.decode(b"", final=True)

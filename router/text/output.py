"""One choice's output: from the tokens that arrive to the text, token strings and ids that a client is shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cluster.messages import Emitted
from router.text.detokenizer import IncrementalDetokenizer
from router.text.stop_matcher import StopMatcher
from router.text.token_table import TokenTable

LOWEST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON does not have."""


class TokenInfo(NamedTuple):
    """A token with its probability, and where its text begins in the choice's text (in characters)."""

    token: int
    data: bytes
    logprob: float
    top: list[tuple[int, bytes, float]]
    """The most likely tokens at this place, best first."""
    text_offset: int


class Delta(NamedTuple):
    """What is new since the last one. `infos` and `token_ids` also count tokens whose text is hidden or held back."""

    text: str
    infos: list[TokenInfo]
    token_ids: list[int]


class ChoiceOutput:
    """Collects tokens (`push`) and gives out what can be shown (`take`). Every token pushed counts as output."""

    def __init__(
        self,
        table: TokenTable,
        stops: Sequence[str],
        stop_token_ids: Iterable[int],
        *,
        continues_prompt: bool,
    ) -> None:
        """`continues_prompt`: the text goes on from the prompt's, see `IncrementalDetokenizer`."""
        self._table = table
        self._detokenizer = IncrementalDetokenizer(table, strip_leading_space=not continues_prompt)
        self._matcher = StopMatcher(stops)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._text: list[str] = []
        self._infos: list[TokenInfo] = []
        self._token_ids: list[int] = []
        self._characters = 0
        self.tokens = 0

    @property
    def stopped(self) -> bool:
        """A stop string is complete: later tokens are not part of the output."""
        return self._matcher.matched

    def push(self, emitted: Emitted) -> None:
        """The next token; ignored after a stop string."""
        if self.stopped:
            return
        if emitted.logprobs is not None:
            top = [(token, self._bytes(token), _finite(logprob)) for token, logprob in emitted.logprobs.top]
            chosen = _finite(emitted.logprobs.chosen)
            self._infos.append(TokenInfo(emitted.token, self._bytes(emitted.token), chosen, top, self._characters))
        self._add(emitted.token)

    def skip(self, tokens: Iterable[int]) -> None:
        """The next tokens, of which all that can be shown was shown already."""
        for token in tokens:
            self._add(token)
        self.take()

    def end(self) -> None:
        """No more tokens: what was held back, for a stop string or for the rest of a character, is text after all."""
        if not self.stopped:
            self._show(self._detokenizer.flush())
        if not self.stopped:
            self._text.append(self._matcher.flush())

    def take(self) -> Delta:
        """All that is new."""
        delta = Delta("".join(self._text), self._infos, self._token_ids)
        self._text, self._infos, self._token_ids = [], [], []
        return delta

    def _add(self, token: int) -> None:
        self.tokens += 1
        self._token_ids.append(token)
        # A stop token ends the choice; it has no text, whatever it stands for.
        text = "" if token in self._stop_token_ids else self._detokenizer.push(token)
        self._characters += len(text)
        self._show(text)

    def _show(self, text: str) -> None:
        if text:
            self._text.append(self._matcher.push(text))

    def _bytes(self, token: int) -> bytes:
        return self._table.bytes_of(token)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)

"""Streams whose client went away before the end: what they had, for the case that it comes back here.

Nothing depends on it: without it, the request is computed again from its beginning, with the same tokens. It saves the
decoding of those that the client has.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from router.dispatch import ChoiceSpec, Generation

KEPT_TOKENS = 400_000
"""Prompts and outputs of all that are kept: some 15 MB."""


class _Kept(NamedTuple):
    choices: Sequence[ChoiceSpec]
    outputs: list[list[int]]

    @property
    def tokens(self) -> int:
        return sum(len(choice.prompt) for choice in self.choices) + sum(len(output) for output in self.outputs)


class UnfinishedStreams:
    """By the client's request id. On one event loop."""

    def __init__(self, capacity: int = KEPT_TOKENS) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._tokens = 0
        self._handlers: dict[str, asyncio.Task[Any]] = {}
        """Of the streams that are being told."""

    @contextmanager
    def telling(self, request: str, choices: Sequence[ChoiceSpec], generation: Generation) -> Iterator[None]:
        """While the current task tells a client this stream. What it had is kept, unless the client has got it all."""
        task = asyncio.current_task()
        assert task is not None
        self._handlers[request] = task
        self._forget(request)
        told = False
        try:
            yield
            told = generation.finished
        finally:
            if not told:
                self._keep(request, _Kept(choices, generation.outputs))
            if self._handlers.get(request) is task:
                del self._handlers[request]

    async def take(self, request: str, choices: Sequence[ChoiceSpec]) -> list[list[int]] | None:
        """What a stream of the same request had; None if it is not known here.

        If it is still being told, its client has lost the connection and we have not noticed yet: it ends now.
        """
        handler = self._handlers.get(request)
        if handler is not None:
            handler.cancel()
            await asyncio.wait({handler})
        kept = self._kept.get(request)
        return kept.outputs if kept is not None and kept.choices == choices else None

    def _keep(self, request: str, kept: _Kept) -> None:
        self._forget(request)
        self._kept[request] = kept
        self._tokens += kept.tokens
        while self._tokens > self._capacity:
            self._forget(next(iter(self._kept)))

    def _forget(self, request: str) -> None:
        kept = self._kept.pop(request, None)
        if kept is not None:
            self._tokens -= kept.tokens

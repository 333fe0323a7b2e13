"""One request being answered: what its generation delivers becomes text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from cluster.errors import BatonError, InvalidRequest
from cluster.messages import FinishReason
from router.api.cursor import HEADER, Cursor
from router.api.formats import FinishText, Heading
from router.api.plan import Plan
from router.api.responses import PromptTokensDetails, Usage
from router.dispatch import Delivered, Ended, Failed, Generation
from router.text.output import ChoiceOutput, Delta


class Progress(NamedTuple):
    """New output of a choice; `finish` is set in its last one. `tokens` is their number so far."""

    choice: int
    tokens: int
    delta: Delta
    finish: FinishText | None


class Exchange:
    """One request being answered: the plan, its generation, and the outputs so far."""

    def __init__(
        self,
        plan: Plan,
        generation: Generation,
        outputs: Sequence[ChoiceOutput],
        heading: Heading,
        cursor: Cursor | None = None,
    ) -> None:
        """`cursor`: what the client has of it; that is computed, but not told again."""
        self.plan = plan
        self.heading = heading
        self.cursor = cursor or Cursor(len(outputs))
        """What was told, as of the stream's last event."""
        self._told = list(self.cursor.marks)
        self._generation = generation
        self._outputs = outputs
        self._open = set(range(len(outputs)))
        for output, choice in zip(outputs, generation.specs, strict=True):
            output.skip(choice.output)

    async def progress(self) -> AsyncIterator[list[Progress]]:
        """What is new, as it comes, until all choices have ended. Raises the error of the first that fails."""
        while self._open:
            new: list[Progress] = []
            failure: BatonError | None = None
            for event in await self._generation.events():
                if event.choice not in self._open:
                    continue
                if isinstance(event, Failed):
                    failure = event.error
                    break
                news = self._delivered(event) if isinstance(event, Delivered) else self._ended(event)
                if news is not None:
                    new.append(news)
            if new:
                yield new
            if failure is not None:
                raise failure

    @property
    def recoveries(self) -> int:
        return self._generation.recoveries

    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        traces = [choice.trace for choice in self._generation.choices]
        prompt = sum(len(prompt) for prompt in self.plan.prompts)
        completion = sum(output.tokens for output in self._outputs)
        cached = sum(trace.cached_tokens for trace in traces[:: self.plan.n])
        return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))

    def _delivered(self, event: Delivered) -> Progress | None:
        output, told = self._outputs[event.choice], self._told[event.choice]
        for emitted in event.tokens:
            output.push(emitted)
            if output.tokens == told.tokens:
                output.take()
        if output.stopped:
            self._open.discard(event.choice)
            self._generation.stop(event.choice)
            return self._last(event.choice, "stop")
        if output.tokens <= told.tokens:
            return None
        if told.finished:
            raise self._of_another(event.choice)
        delta = output.take()
        # A token may have no text yet (half a character, half a stop string): a client hears of it with the next.
        visible = delta.text or delta.infos or (delta.token_ids and self.heading.token_ids)
        return Progress(event.choice, output.tokens, delta, None) if visible else None

    def _ended(self, event: Ended) -> Progress | None:
        output = self._outputs[event.choice]
        self._open.discard(event.choice)
        output.end()
        by_stop = output.stopped or event.reason is FinishReason.STOP
        return self._last(event.choice, "stop" if by_stop else "length")

    def _last(self, choice: int, finish: FinishText) -> Progress | None:
        """What ends a choice, unless it was told. Raises `InvalidRequest` if more was told than there is."""
        output, told = self._outputs[choice], self._told[choice]
        if told.tokens > output.tokens or (told.finished and told.tokens != output.tokens):
            raise self._of_another(choice)
        return None if told.finished else Progress(choice, output.tokens, output.take(), finish)

    def _of_another(self, choice: int) -> InvalidRequest:
        told, tokens = self._told[choice], self._outputs[choice].tokens
        return InvalidRequest(
            f"{HEADER}: it says {told} of choice {choice}, which has {tokens} tokens: is it of this request?",
            param=HEADER,
        )

"""One request being answered: what its generation delivers becomes text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from cluster.errors import BatonError
from cluster.messages import FinishReason
from router.api.formats import FinishText, Heading
from router.api.plan import Plan
from router.api.responses import PromptTokensDetails, Usage
from router.dispatch import Delivered, Ended, Failed, Generation
from router.text.output import ChoiceOutput, Delta


class Progress(NamedTuple):
    """New output of a choice; `finish` is set in its last one."""

    choice: int
    delta: Delta
    finish: FinishText | None


class Exchange:
    """One request being answered: the plan, its generation, and the outputs so far."""

    def __init__(self, plan: Plan, generation: Generation, outputs: Sequence[ChoiceOutput], heading: Heading) -> None:
        self.plan = plan
        self.heading = heading
        self._generation = generation
        self._outputs = outputs
        self._open = set(range(len(outputs)))

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

    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        traces = [choice.trace for choice in self._generation.choices]
        prompt = sum(len(prompt) for prompt in self.plan.prompts)
        completion = sum(output.tokens for output in self._outputs)
        cached = sum(trace.cached_tokens for trace in traces[:: self.plan.n])
        return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))

    def _delivered(self, event: Delivered) -> Progress | None:
        output = self._outputs[event.choice]
        for emitted in event.tokens:
            output.push(emitted)
        if output.stopped:
            self._open.discard(event.choice)
            self._generation.stop(event.choice)
            return Progress(event.choice, output.take(), "stop")
        delta = output.take()
        # A token may have no text yet (half a character, half a stop string): a client hears of it with the next.
        visible = delta.text or delta.infos or (delta.token_ids and self.heading.token_ids)
        return Progress(event.choice, delta, None) if visible else None

    def _ended(self, event: Ended) -> Progress:
        output = self._outputs[event.choice]
        self._open.discard(event.choice)
        output.end()
        by_stop = output.stopped or event.reason is FinishReason.STOP
        return Progress(event.choice, output.take(), "stop" if by_stop else "length")

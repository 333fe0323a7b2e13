"""The shell around `RequestMachine`: places choices, posts to workers, and sorts what they say by fence.

A `Generation` is one request's choices under way. Its reader (the HTTP handler) takes events out of a mailbox at its
own speed; what can pile up there is bounded by the tokens the request asked for. A slow reader holds up nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, Union

from cluster.clock import Clock
from cluster.errors import AvailabilityError, BatonError, IllegalTransition, RequestError, WorkerLost, from_info
from cluster.logging import get_logger
from cluster.messages import (
    AnyMessage,
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    Emitted,
    Fence,
    FinishReason,
    Role,
    Sampling,
    Tokens,
)
from cluster.metrics import RouterMetrics
from router.fleet import Fleet
from router.policies import Need, Placement
from router.records import ChoiceTrace, RecordStore
from router.request_state import (
    Action,
    Cancel,
    ClientGone,
    DeadlinePassed,
    Deliver,
    Dispatch,
    Fail,
    Finish,
    Forget,
    LegFailed,
    LegFinished,
    LegLost,
    LegStarted,
    NotPlaced,
    PlaceAgain,
    Placed,
    Release,
    RequestMachine,
    StopMatched,
    TokensArrived,
    WorkerKey,
)

log = get_logger(__name__)


class ChoiceSpec(NamedTuple):
    """One completion to make: token ids of the prompt, final sampling settings."""

    prompt: list[int]
    sampling: Sampling
    priority: int = 0


class Delivered(NamedTuple):
    """The next tokens of a choice, in order."""

    choice: int
    tokens: list[Emitted]


class Ended(NamedTuple):
    """The choice has all its tokens."""

    choice: int
    reason: FinishReason


class Failed(NamedTuple):
    choice: int
    error: BatonError


ChoiceEvent = Union[Delivered, Ended, Failed]


class _Choice:
    """A machine, what the shell knows of it, and whom it delivers to."""

    def __init__(self, index: int, spec: ChoiceSpec, trace: ChoiceTrace, generation: Generation) -> None:
        self.index = index
        self.trace = trace
        self.generation = generation
        self.machine = RequestMachine(trace.id, spec.prompt, spec.sampling, spec.priority)
        self.need = Need(len(spec.prompt), spec.sampling.max_tokens)
        """Of the attempt under way."""
        self.legs: dict[WorkerKey, Role] = {}
        """Where its legs are under way."""
        self._spec = spec

    def need_again(self) -> Need:
        """Of its next attempt, which computes what the client got before it goes on."""
        delivered = self.machine.delivered
        self.need = Need(len(self._spec.prompt) + delivered, self._spec.sampling.max_tokens - delivered)
        return self.need


class Generation:
    """One request's choices. Read with `events` until each has `Ended` or one has `Failed`; then, always, `close`."""

    def __init__(self, dispatcher: Dispatcher, specs: Sequence[ChoiceSpec], traces: Sequence[ChoiceTrace]) -> None:
        self._dispatcher = dispatcher
        self._mailbox: list[ChoiceEvent] = []
        self._mail = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None
        self.choices = [
            _Choice(index, spec, trace, self) for index, (spec, trace) in enumerate(zip(specs, traces, strict=True))
        ]

    async def events(self) -> list[ChoiceEvent]:
        """All that has happened since the last call; waits for something to happen."""
        await self._mail.wait()
        self._mail.clear()
        events, self._mailbox = self._mailbox, []
        return events

    def stop(self, index: int) -> None:
        """The text of choice `index` has reached a stop string."""
        self._dispatcher.handle(self.choices[index], StopMatched())

    def close(self, reason: str) -> None:
        """Nobody reads any more: what is under way is cancelled, on both legs. Harmless when all has ended."""
        for choice in self.choices:
            self._dispatcher.handle(choice, ClientGone(reason))

    def deliver(self, event: ChoiceEvent) -> None:
        self._mailbox.append(event)
        self._mail.set()

    def start_deadline(self, seconds: float) -> None:
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._deadline_passed, seconds)

    def settle(self) -> None:
        """A choice is over; with the last one the deadline is."""
        if self._deadline is not None and all(choice.machine.ended and not choice.legs for choice in self.choices):
            self._deadline.cancel()

    def _deadline_passed(self, seconds: float) -> None:
        for choice in self.choices:
            self._dispatcher.handle(choice, DeadlinePassed(seconds))


class Dispatcher:
    """All choices under way, by fence. Lives on the router's event loop."""

    def __init__(
        self, fleet: Fleet, records: RecordStore, metrics: RouterMetrics, clock: Clock, timeout_seconds: float
    ) -> None:
        self._fleet = fleet
        self._records = records
        self._metrics = metrics
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._choices: dict[Fence, _Choice] = {}

    @property
    def in_flight(self) -> int:
        """Choices that are not forgotten yet."""
        return len(self._choices)

    def begin(
        self, request: str, alias: str, specs: Sequence[ChoiceSpec], arrived: float, tokenize_seconds: float
    ) -> Generation:
        """Places and dispatches all choices. `request` is unique for all time, `alias` the client's own id for it.

        Raises `NoWorker` or `PromptTooLong`; then nothing was dispatched.
        """
        traces = [
            ChoiceTrace(f"{request}-{index}", len(spec.prompt), arrived, tokenize_seconds)
            for index, spec in enumerate(specs)
        ]
        generation = Generation(self, specs, traces)
        for choice in generation.choices:
            self._fleet.require(choice.need)
        for choice in generation.choices:
            self._place(choice, self._fleet.place(choice.need))
        self._records.add(request, alias, traces)
        generation.start_deadline(self._timeout_seconds)
        return generation

    def handle(self, choice: _Choice, event: object) -> None:
        """Gives `event` to the choice's machine and carries out what it wants. A defect ends this choice only."""
        now = self._clock.now()
        try:
            actions = choice.machine.handle(event, now)
        except IllegalTransition as error:
            log.exception("defect in a request's life", request=choice.trace.id, error=str(error))
            self._metrics.errors.labels(error=type(error).__name__).inc()
            choice.generation.deliver(Failed(choice.index, error))
            return
        for action in actions:
            self._carry_out(choice, action, now)

    # --- from the workers --------------------------------------------------------------------------------------------

    def receive(self, key: WorkerKey, message: AnyMessage) -> None:
        if isinstance(message, Tokens):
            for emitted in message.tokens:
                choice = self._find(emitted.fence, "Tokens")
                if choice is not None:
                    self.handle(choice, TokensArrived([emitted]))
        elif isinstance(message, AttemptStarted | AttemptFinished | AttemptFailed):
            choice = self._find(message.fence, type(message).__name__)
            if choice is not None:
                self._leg_word(choice, message)
        else:
            self._metrics.stale.labels(kind=type(message).__name__).inc()
            log.warning("a worker sent what is not for routers", worker=key.worker, kind=type(message).__name__)

    def worker_lost(self, key: WorkerKey, reason: str) -> None:
        for choice in [choice for choice in self._choices.values() if key in choice.legs]:
            role = choice.legs[key]
            error = WorkerLost(f"{role.value} worker {key.worker} was lost: {reason}")
            self.handle(choice, LegLost(role, error))

    def _find(self, fence: Fence, kind: str) -> _Choice | None:
        choice = self._choices.get(fence)
        if choice is None:
            # Not always an error: what a worker said before our cancel reached it ends up here, too.
            self._metrics.stale.labels(kind=kind).inc()
        return choice

    def _leg_word(self, choice: _Choice, message: AttemptStarted | AttemptFinished | AttemptFailed) -> None:
        trace = choice.trace
        if isinstance(message, AttemptStarted):
            if trace.started_at is None:
                trace.started_at = self._clock.now()
            # Later attempts find what the first one computed: that is no saving of this request's.
            if trace.attempts == 1:
                trace.cached_tokens = max(trace.cached_tokens, message.cached_tokens)
            self.handle(choice, LegStarted(message.role))
        elif isinstance(message, AttemptFinished):
            event = LegFinished(message.role, message.reason, message.prefill, message.handoff, message.decode)
            self.handle(choice, event)
        else:
            self.handle(choice, LegFailed(message.role, message.blame, from_info(message.error)))

    # --- actions -----------------------------------------------------------------------------------------------------

    def _place(self, choice: _Choice, placement: Placement) -> None:
        prefill, decode = placement.prefill, placement.decode
        trace = choice.trace
        trace.prefill_worker = prefill.member.worker if prefill else None
        trace.decode_worker = decode.member.worker if decode else None
        trace.attempts += 1
        if trace.placed_at is None:
            trace.placed_at = self._clock.now()
        self.handle(choice, Placed(prefill.key if prefill else None, decode.key if decode else None))
        log.debug("placed", request=trace.id, prefill=trace.prefill_worker, decode=trace.decode_worker)

    def _place_again(self, choice: _Choice, action: PlaceAgain) -> None:
        self._choices.pop(action.fence, None)
        self._metrics.resumptions.labels(reason=action.reason.value).inc()
        try:
            placement = self._fleet.place(choice.need_again())
        except (AvailabilityError, RequestError) as error:
            self.handle(choice, NotPlaced(error))
        else:
            self._place(choice, placement)

    def _carry_out(self, choice: _Choice, action: Action, now: float) -> None:
        if isinstance(action, Deliver):
            for gap in choice.trace.tokens(len(action.tokens), now):
                self._metrics.inter_token.observe(gap)
            choice.generation.deliver(Delivered(choice.index, action.tokens))
        elif isinstance(action, Dispatch):
            self._choices[action.attempt.fence] = choice
            choice.legs[action.worker] = action.role
            self._fleet.commit(action.worker, action.attempt.fence, choice.need)
            self._fleet.post(action.worker, action.attempt)
        elif isinstance(action, Cancel):
            self._fleet.post(action.worker, action.message)
        elif isinstance(action, Release):
            choice.legs.pop(action.worker, None)
            self._fleet.release(action.worker, action.fence)
        elif isinstance(action, Finish):
            choice.trace.ended_at = now
            choice.trace.finish_reason = action.reason.value
            choice.generation.deliver(Ended(choice.index, action.reason))
        elif isinstance(action, Fail):
            self._failed(choice, action, now)
        elif isinstance(action, PlaceAgain):
            self._place_again(choice, action)
        elif isinstance(action, Forget):
            self._forget(choice, action, now)

    def _failed(self, choice: _Choice, action: Fail, now: float) -> None:
        trace = choice.trace
        trace.ended_at = now
        trace.finish_reason = "error"
        trace.error = type(action.error).__name__
        trace.blame = action.blame.value if action.blame else None
        log.warning(
            "attempt failed",
            request=trace.id,
            error=str(action.error),
            kind=trace.error,
            blame=trace.blame,
            prefill=trace.prefill_worker,
            decode=trace.decode_worker,
        )
        choice.generation.deliver(Failed(choice.index, action.error))

    def _forget(self, choice: _Choice, action: Forget, now: float) -> None:
        if action.fence is not None:
            self._choices.pop(action.fence, None)
        trace, machine = choice.trace, choice.machine
        if trace.ended_at is None:
            trace.ended_at = now
            trace.finish_reason = FinishReason.CANCELLED.value
        trace.prefill, trace.handoff, trace.decode = (
            machine.prefill_timings,
            machine.handoff_timings,
            machine.decode_timings,
        )
        trace.seal()
        choice.generation.settle()

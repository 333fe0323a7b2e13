"""The shell around `RequestMachine`: places choices, posts to workers, and sorts what they say by fence.

A `Generation` is one request's choices under way. Its reader (the HTTP handler) takes events out of a mailbox at its
own speed; what can pile up there is bounded by the tokens the request asked for. A slow reader holds up nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, Union

from cluster.clock import Clock
from cluster.config import Recovery
from cluster.errors import (
    AvailabilityError,
    BatonError,
    IllegalTransition,
    NoWorker,
    RequestError,
    WorkerLost,
    WorkerSilent,
    WorkerStalled,
    from_info,
)
from cluster.logging import get_logger
from cluster.messages import (
    AnyMessage,
    AttemptFailed,
    AttemptFinished,
    AttemptStarted,
    Emitted,
    Fence,
    FinishReason,
    PrefillAttempt,
    Role,
    Sampling,
    Tokens,
)
from cluster.metrics import RouterMetrics
from router.breaker_state import Event as BreakerEvent
from router.breaker_state import LegBegan, LegBlamed, LegEnded, LegProved, LegSucceeded, Opened
from router.breakers import Breakers
from router.fleet import Fleet
from router.fleet_view import Stall
from router.hints import Hints
from router.policies import Need, Placement
from router.records import ChoiceTrace, RecordStore
from router.recovery import Interruption
from router.request_state import (
    Action,
    AttemptOver,
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
    LegStalled,
    LegStarted,
    NotPlaced,
    PlaceAgain,
    Placed,
    Release,
    RequestMachine,
    RequestState,
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
    output: Sequence[int] = ()
    """Tokens that the client has already, fewer than there are: they are computed, and not given again."""


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

    def __init__(
        self, index: int, spec: ChoiceSpec, trace: ChoiceTrace, generation: Generation, recovery: Recovery
    ) -> None:
        self.index = index
        self.trace = trace
        self.generation = generation
        self.machine = RequestMachine(trace.id, spec.prompt, spec.sampling, spec.priority, recovery, spec.output)
        self.legs: dict[WorkerKey, Role] = {}
        """Where its legs are under way."""
        self.wait: asyncio.TimerHandle | None = None
        """Until it is placed again."""
        self.prefilling_at: WorkerKey | None = None
        """Where its prompt is being computed."""
        self._spec = spec
        self.need = self.need_again()
        """Of the attempt under way."""

    def need_again(self) -> Need:
        """Of its next attempt, which computes what the client got before it goes on."""
        delivered = self.machine.delivered
        self.need = Need(len(self._spec.prompt) + delivered, self._spec.sampling.max_tokens - delivered)
        return self.need


class Generation:
    """One request's choices. Read with `events` until each has `Ended` or one has `Failed`; then, always, `close`."""

    def __init__(
        self, dispatcher: Dispatcher, specs: Sequence[ChoiceSpec], traces: Sequence[ChoiceTrace], recovery: Recovery
    ) -> None:
        self._dispatcher = dispatcher
        self._mailbox: list[ChoiceEvent] = []
        self._mail = asyncio.Event()
        self._deadline: asyncio.TimerHandle | None = None
        self.specs = specs
        self.on_begun: Callable[[int], None] = lambda choice: None
        """Called when the first compute for a choice begins."""
        self.choices = [
            _Choice(index, spec, trace, self, recovery)
            for index, (spec, trace) in enumerate(zip(specs, traces, strict=True))
        ]

    @property
    def recoveries(self) -> int:
        """How often a choice went on as another attempt, so far."""
        return sum(max(0, choice.trace.attempts - 1) for choice in self.choices)

    @property
    def finished(self) -> bool:
        """All choices have come to their proper end."""
        return all(choice.machine.state is RequestState.FINISHED for choice in self.choices)

    @property
    def outputs(self) -> list[list[int]]:
        """The tokens of each choice so far."""
        return [list(choice.machine.output) for choice in self.choices]

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

    def refuse(self, error: BatonError) -> None:
        """Its place is given to another, before anything of it has begun: it ends with `error`."""
        self.close(error.message)
        self.deliver(Failed(0, error))

    def deliver(self, event: ChoiceEvent) -> None:
        self._mailbox.append(event)
        self._mail.set()

    def start_deadline(self, seconds: float, left: float) -> None:
        """`seconds` is all that the request has, `left` what is left of it."""
        self._deadline = asyncio.get_running_loop().call_later(max(0.0, left), self._deadline_passed, seconds)

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
        self,
        fleet: Fleet,
        records: RecordStore,
        metrics: RouterMetrics,
        clock: Clock,
        recovery: Recovery,
    ) -> None:
        self._fleet = fleet
        self._records = records
        self._metrics = metrics
        self._clock = clock
        self._recovery = recovery
        self._breakers = Breakers(recovery)
        for kind in Interruption:
            metrics.resumptions.labels(reason=kind.value)
        self._choices: dict[Fence, _Choice] = {}
        self._waiting: set[_Choice] = set()
        """Between two attempts."""

    @property
    def in_flight(self) -> int:
        """Choices that are not forgotten yet."""
        return len(self._choices) + len(self._waiting)

    @property
    def shut_out(self) -> list[str]:
        """Names of the workers that get work only if there is no other, for what requests have suffered there."""
        return sorted(worker for worker, _ in self._breakers.shut(self._clock.now()))

    def observe(self) -> None:
        """Brings the gauges of the fleet up to date."""
        self._fleet.observe(self._breakers.shut(self._clock.now()))

    def begin(
        self,
        request: str,
        alias: str,
        specs: Sequence[ChoiceSpec],
        arrived: float,
        tokenize_seconds: float,
        timeout_seconds: float,
    ) -> Generation:
        """Places and dispatches all choices, or lets them wait for workers that were here a moment ago. `request` is
        unique for all time, `alias` the client's own id for it, and `timeout_seconds` all the time it has, from its
        arrival.

        Raises `NoWorker` or `PromptTooLong`; then nothing was dispatched.
        """
        traces = [
            ChoiceTrace(f"{request}-{index}", len(spec.prompt), arrived, tokenize_seconds)
            for index, spec in enumerate(specs)
        ]
        generation = Generation(self, specs, traces, self._recovery)
        try:
            for choice in generation.choices:
                self._fleet.require(choice.need)
        except NoWorker as error:
            if not self._expected(error):
                raise
        self._records.add(request, alias, traces)
        generation.start_deadline(timeout_seconds, arrived + timeout_seconds - self._clock.now())
        for choice in generation.choices:
            self._seek(choice)
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
                choice = self._find(key, emitted.fence, "Tokens")
                if choice is not None:
                    self._note_prefilled(choice, emitted.fence)
                    self.handle(choice, TokensArrived([emitted]))
        elif isinstance(message, AttemptStarted | AttemptFinished | AttemptFailed):
            choice = self._find(key, message.fence, type(message).__name__)
            if choice is not None:
                self._leg_word(choice, message)
        else:
            self._metrics.stale.labels(kind=type(message).__name__).inc()
            log.warning("a worker sent what is not for routers", worker=key.worker, kind=type(message).__name__)

    def worker_lost(self, key: WorkerKey, reason: str) -> None:
        for choice, role in self._legs_at(key):
            self.handle(choice, LegLost(role, WorkerLost(f"{role.value} worker {key.worker} was lost: {reason}")))

    def worker_stalled(self, key: WorkerKey, stall: Stall) -> None:
        legs = self._legs_at(key)
        log.warning("worker stalled", worker=key.worker, epoch=key.epoch, reason=stall.reason, attempts=len(legs))
        kind = WorkerSilent if stall.silent else WorkerStalled
        for choice, role in legs:
            self.handle(choice, LegStalled(role, kind(f"{role.value} worker {key.worker} stalled: {stall.reason}")))

    def _legs_at(self, key: WorkerKey) -> list[tuple[_Choice, Role]]:
        return [(choice, choice.legs[key]) for choice in self._choices.values() if key in choice.legs]

    def _find(self, key: WorkerKey, fence: Fence, kind: str) -> _Choice | None:
        """The choice of that attempt, if the one that speaks of it has a leg of it."""
        choice = self._choices.get(fence)
        if choice is None or key not in choice.legs:
            # Not always an error: what a worker said before our cancel reached it ends up here, too.
            self._metrics.stale.labels(kind=kind).inc()
            return None
        return choice

    def _note_prefilled(self, choice: _Choice, fence: Fence) -> None:
        """An attempt's first token: its prompt keeps nobody waiting any more."""
        if choice.prefilling_at is not None:
            self._fleet.prefilled(choice.prefilling_at, fence)
            choice.prefilling_at = None

    def _leg_word(self, choice: _Choice, message: AttemptStarted | AttemptFinished | AttemptFailed) -> None:
        trace = choice.trace
        if isinstance(message, AttemptStarted):
            if trace.started_at is None:
                trace.started_at = self._clock.now()
                choice.generation.on_begun(choice.index)
            # Later attempts find what the first one computed: that is no saving of this request's.
            if trace.attempts == 1:
                cached = min(message.cached_tokens, trace.prompt_tokens)
                trace.cached_tokens = max(trace.cached_tokens, cached)
            if message.role is Role.DECODE:
                self._tell_breaker(trace.decode_worker, message.role, LegProved(message.fence))
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
        trace.placed(prefill and prefill.key.worker, decode and decode.key.worker, self._clock.now())
        self.handle(choice, Placed(prefill and prefill.key, decode and decode.key))
        log.debug("placed", request=trace.id, prefill=trace.prefill_worker, decode=trace.decode_worker)

    def _attempt_over(self, choice: _Choice, action: AttemptOver, now: float) -> None:
        self._choices.pop(action.fence, None)
        trace, culprit = choice.trace, action.worker.worker if action.worker else None
        trace.interrupted(action.kind.value, action.error, culprit, now)
        if action.error is None:
            return
        blame = action.blame.value if action.blame else "none"
        self._metrics.failures.labels(error=type(action.error).__name__, role=blame).inc()
        if culprit is not None and action.error.fault:
            role = Role.PREFILL if culprit == trace.prefill_worker else Role.DECODE
            self._tell_breaker(culprit, role, LegBlamed(action.fence))
        log.warning(
            "attempt failed",
            request=trace.id,
            attempt=action.fence.attempt,
            error=action.error.message,
            kind=type(action.error).__name__,
            blame=culprit,
            prefill=trace.prefill_worker,
            decode=trace.decode_worker,
            tokens=trace.history[-1].tokens,
        )

    def _wait(self, choice: _Choice, action: PlaceAgain) -> None:
        if not action.after_seconds:
            self._place_again(choice, action)
            return
        self._waiting.add(choice)
        loop = asyncio.get_running_loop()
        choice.wait = loop.call_later(action.after_seconds, self._place_again, choice, action)

    def _place_again(self, choice: _Choice, action: PlaceAgain) -> None:
        self._wait_no_more(choice)
        self._seek(choice, action.avoid, action.keep)

    def _seek(
        self, choice: _Choice, avoid: frozenset[WorkerKey] = frozenset(), keep: frozenset[WorkerKey] = frozenset()
    ) -> None:
        """A place for its next attempt."""
        try:
            placement = self._fleet.place(
                choice.need_again(), Hints(avoid, keep, self._breakers.shut(self._clock.now()))
            )
        except (AvailabilityError, RequestError) as error:
            self.handle(choice, NotPlaced(error, self._expected(error)))
            return
        if choice.trace.history:
            self._metrics.resumptions.labels(reason=choice.trace.history[-1].end).inc()
        self._place(choice, placement)

    def _expected(self, error: BatonError) -> bool:
        """Whether a worker for it may be on its way back."""
        return isinstance(error, NoWorker) and self._fleet.absent_seconds() < self._recovery.absence_seconds

    def _wait_no_more(self, choice: _Choice) -> None:
        if choice.wait is not None:
            choice.wait.cancel()
            choice.wait = None
        self._waiting.discard(choice)

    def _tell_breaker(self, worker: str | None, role: Role, event: BreakerEvent) -> None:
        if worker is None:
            return
        for action in self._breakers.handle((worker, role), event, self._clock.now()):
            if isinstance(action, Opened):
                self._metrics.breaker_tripped(worker, role)
                log.warning("worker shut out", worker=worker, role=role.value, seconds=action.seconds)
            else:
                log.info("worker in use again", worker=worker, role=role.value)

    def _carry_out(self, choice: _Choice, action: Action, now: float) -> None:
        if isinstance(action, Deliver):
            for gap in choice.trace.tokens(len(action.tokens), now):
                self._metrics.inter_token.observe(gap)
            choice.generation.deliver(Delivered(choice.index, action.tokens))
        elif isinstance(action, Dispatch):
            self._choices[action.attempt.fence] = choice
            choice.legs[action.worker] = action.role
            prefills = isinstance(action.attempt, PrefillAttempt) or action.attempt.prefill is None
            if prefills:
                choice.prefilling_at = action.worker
            self._fleet.commit(action.worker, action.attempt.fence, choice.need, prefills=prefills)
            self._tell_breaker(action.worker.worker, action.role, LegBegan(action.attempt.fence))
            self._fleet.post(action.worker, action.attempt)
        elif isinstance(action, Cancel):
            self._fleet.post(action.worker, action.message)
        elif isinstance(action, Release):
            choice.legs.pop(action.worker, None)
            self._fleet.release(action.worker, action.fence)
            over = LegSucceeded(action.fence) if action.well else LegEnded(action.fence)
            self._tell_breaker(action.worker.worker, action.role, over)
        elif isinstance(action, Finish):
            choice.trace.end(action.reason.value, now)
            choice.generation.deliver(Ended(choice.index, action.reason))
        elif isinstance(action, Fail):
            self._failed(choice, action, now)
        elif isinstance(action, AttemptOver):
            self._attempt_over(choice, action, now)
        elif isinstance(action, PlaceAgain):
            self._wait(choice, action)
        elif isinstance(action, Forget):
            self._forget(choice, action, now)

    def _failed(self, choice: _Choice, action: Fail, now: float) -> None:
        trace = choice.trace
        trace.end("error", now)
        trace.error = type(action.error).__name__
        trace.blame = action.blame.value if action.blame else None
        log.warning("request failed", request=trace.id, error=str(action.error), kind=trace.error, blame=trace.blame)
        choice.generation.deliver(Failed(choice.index, action.error))

    def _forget(self, choice: _Choice, action: Forget, now: float) -> None:
        if action.fence is not None:
            self._choices.pop(action.fence, None)
        self._wait_no_more(choice)
        trace, timings = choice.trace, choice.machine.timings
        trace.end(FinishReason.CANCELLED.value, now)
        trace.prefill, trace.handoff, trace.decode = timings.prefill, timings.handoff, timings.decode
        trace.seal()
        choice.generation.settle()

"""The step loop's work on a prefill worker: feeds one `PrefillMachine` per attempt and carries out what they ask for.

Owns the attempts. The pages belong to the engine's ledger, the handoffs to the `HandoffSender`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from cluster.clock import Clock
from cluster.engine_messages import (
    EngineMessage,
    FromPeer,
    FromRouter,
    PeerDown,
    PeerUp,
    RouterGone,
    ToRouter,
)
from cluster.errors import OutOfMemory, RequestError, StaleFence
from cluster.ipc import ReceiveOnly
from cluster.logging import get_logger
from cluster.messages import (
    Abort,
    Ack,
    AttemptFailed,
    CancelAttempt,
    Emitted,
    Fence,
    FinishReason,
    Grant,
    Load,
    Message,
    PrefillAttempt,
    Role,
    Tokens,
)
from engine.engine import Engine, StepPlan, StepResult
from engine.sequence import Sequence
from kv_transfer.sender import HandoffSender
from prefill_worker import prefill_state as state
from prefill_worker.prefill_state import PrefillMachine, PrefillState

log = get_logger(__name__)

LINGER_SECONDS = 0.002
"""How long the next step may wait for the last pages of a prompt that is computed; they are few, for the others have
gone out before."""
NO_MEMORY = OutOfMemory("the prefill worker's device has no memory for a step with this request").to_info()
PeerMessage = FromPeer | PeerUp | PeerDown
RouterMessage = FromRouter | RouterGone
FROM_PEERS: tuple[type[PeerMessage], ...] = (FromPeer, PeerUp, PeerDown)
FROM_ROUTERS: tuple[type[RouterMessage], ...] = (FromRouter, RouterGone)


@dataclass(slots=True)
class _Attempt:
    router: str
    machine: PrefillMachine
    pages: list[int] = field(default_factory=list)
    """Of its sequence, in order; known from its start on."""


class PrefillLoop:
    """A `cluster.step_loop.StepHandler`. `send` puts a message into the channel to the control process, at once;
    `receive_only` takes messages of some kinds out of it, see `EngineChannel`.

    A step on a long chunk takes a good part of a second. Grants, ends of writes and acknowledgements don't wait for it:
    between two layers the sender is given what has come for it. Nor do new attempts that go before it by the pool's
    policy: a step of their own is computed between two layers of it. All else that concerns attempts waits for its end.
    """

    def __init__(
        self,
        engine: Engine,
        sender: HandoffSender,
        send: Callable[[Message], None],
        receive_only: ReceiveOnly,
        clock: Clock,
        epoch: int,
        on_close: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._sender = sender
        self._send = send
        self._receive_only = receive_only
        self._clock = clock
        self._epoch = epoch
        self._on_close = on_close
        self._attempts: dict[Fence, _Attempt] = {}
        self._stale = 0
        self._put_off: list[RouterMessage] = []
        """What came in the middle of a step and waits for its end; it goes before all that comes later."""

    # --- messages ----------------------------------------------------------------------------------------------------

    def handle(self, message: EngineMessage, now: float) -> None:
        self._catch_up(now)
        if isinstance(message, FromRouter):
            self._from_router(message, now)
        elif isinstance(message, FromPeer | PeerUp | PeerDown):
            self._from_peer(message)
        elif isinstance(message, RouterGone):
            for fence in [fence for fence, attempt in self._attempts.items() if attempt.router == message.router]:
                self._feed(fence, state.Cancelled("the router's connection broke"), now)

    def _catch_up(self, now: float) -> None:
        put_off, self._put_off = self._put_off, []
        for message in put_off:
            self.handle(message, now)

    def _from_peer(self, message: PeerMessage) -> None:
        """Touches the sender only: it may come in the middle of a step."""
        if isinstance(message, PeerUp):
            self._sender.peer_up(message.hello)
        elif isinstance(message, PeerDown):
            self._sender.peer_down(message.worker, message.epoch)
        elif isinstance(message.message, Grant | Ack | Abort):
            self._sender.receive(message.worker, message.epoch, message.message)
        else:
            self._stale += 1

    def _from_router(self, envelope: FromRouter, now: float) -> None:
        message = envelope.message
        if isinstance(message, CancelAttempt):
            if message.fence in self._attempts:
                self._feed(message.fence, state.Cancelled(message.reason), now)
        elif isinstance(message, PrefillAttempt):
            self._begin(envelope.router, message, now if envelope.received_at is None else envelope.received_at)

    def _begin(self, router: str, attempt: PrefillAttempt, received_at: float) -> None:
        fence = attempt.fence
        if fence in self._attempts:
            self._stale += 1
            return
        sequence = Sequence(
            fence,
            attempt.prompt,
            list(attempt.output),
            msgspec.structs.replace(attempt.sampling, max_tokens=len(attempt.output) + 1),
            arrived=received_at,
            priority=attempt.priority,
            attempt=fence.attempt,
        )
        try:
            self._require_our_life(fence)
            self._engine.submit(sequence)
        except (RequestError, StaleFence) as error:
            self._send(ToRouter(router, AttemptFailed(fence, Role.PREFILL, Role.PREFILL, error.to_info())))
            return
        self._attempts[fence] = _Attempt(router, PrefillMachine(attempt, received_at))
        log.debug("queued", request=fence.request, tokens=len(attempt.prompt), decode=attempt.decode)

    def _require_our_life(self, fence: Fence) -> None:
        if fence.prefill_epoch != self._epoch:
            self._stale += 1
            raise StaleFence(f"this worker's epoch is {self._epoch}: the attempt is for another life of it")

    # --- steps -------------------------------------------------------------------------------------------------------

    def step(self, now: float) -> bool:
        self._catch_up(now)
        ended = self._sender.poll(now)
        for handoff in ended:
            self._feed(handoff.fence, state.HandoffEnded(handoff.error, handoff.blame, handoff.timings), now)
        plan = self._engine.plan(now)
        if plan is not None:
            self._start(plan, now)
        result = self._engine.compute(plan, lambda: self._between_layers(plan))
        if result is not None:
            self._tell(result)
        return bool(ended) or plan is not None or result is not None

    def _start(self, plan: StepPlan, now: float) -> None:
        """Offers leave before the chunk is computed, so that grants wait for us and not we for them."""
        # What is cached may have been so by a step that is under way.
        settled = self._engine.under_way == 0
        for sequence in plan.started:
            self._attempts[sequence.key].pages = sequence.pages
            self._feed(sequence.key, state.Started(sequence.cached, settled), now)

    def _tell(self, result: StepResult) -> None:
        now = self._clock.now()
        for fence in result.refused:
            known = self._attempts.get(fence)
            if known is not None and known.machine.accepts(state.Refused):  # it may have ended meanwhile
                self._feed(fence, state.Refused(NO_MEMORY), now)
        for progress in result.progress:
            self._feed(progress.key, state.ChunkComputed(progress.computed), now)
        self._emit(result)
        for sampled in result.sampled:
            attempt = self._attempts[sampled.key].machine.attempt
            finished = sampled.finished
            if finished is FinishReason.LENGTH and sampled.offset + 1 < attempt.sampling.max_tokens:
                finished = None  # only our leg's last token
            self._feed(sampled.key, state.FirstToken(sampled.token, finished), now)
        if result.sampled:
            self._sender.linger(LINGER_SECONDS)

    def _between_layers(self, plan: StepPlan | None) -> None:
        """Of a step that may be overtaken; those that overtake it may not."""
        self._attend_to_handoffs()
        now = self._clock.now()
        if plan is not None and self._take_attempts(now) and (shorter := self._engine.overtake(plan, now)) is not None:
            self._start(shorter, now)
            self._tell(self._engine.execute(shorter, self._attend_to_handoffs))

    def _take_attempts(self, now: float) -> bool:
        """Begins those that have come, in the middle of a step; whether there were any. Not behind the news that a
        router is gone: it is of those that came before it."""
        taken = False
        for message in self._receive_only(FROM_ROUTERS):
            overdue = any(isinstance(earlier, RouterGone) for earlier in self._put_off)
            if isinstance(message, FromRouter) and isinstance(message.message, PrefillAttempt) and not overdue:
                self._from_router(message, now)
                taken = True
            else:
                self._put_off.append(message)
        return taken

    def _attend_to_handoffs(self) -> None:
        for message in self._receive_only(FROM_PEERS):
            self._from_peer(message)
        self._sender.advance(self._clock.now())

    def _emit(self, result: StepResult) -> None:
        """First tokens go to their routers before anything else is done about them."""
        by_router: dict[str, list[Emitted]] = {}
        for sampled in result.sampled:
            emitted = Emitted(sampled.key, sampled.offset, sampled.token, sampled.logprobs)
            by_router.setdefault(self._attempts[sampled.key].router, []).append(emitted)
        for router, tokens in by_router.items():
            self._send(ToRouter(router, Tokens(tokens)))

    def _feed(self, fence: Fence, event: object, now: float) -> None:
        attempt = self._attempts[fence]
        for action in attempt.machine.handle(event, now):
            self._carry_out(fence, attempt, action)
        if attempt.machine.state is PrefillState.RELEASED:
            del self._attempts[fence]

    def _carry_out(self, fence: Fence, attempt: _Attempt, action: state.Action) -> None:
        match action:
            case state.Offer(tokens=tokens):
                decode = attempt.machine.attempt.decode
                assert decode is not None
                self._sender.offer(fence, decode, tokens)
            case state.Share(computed=computed):
                self._sender.computed(fence, attempt.pages, computed)
            case state.Complete(first_token=token):
                self._sender.finish(fence, token)
            case state.StopHandoff(error=error):
                self._sender.cancel(fence, error)
            case state.DropSequence():
                self._engine.cancel(fence)
            case state.ReleasePages():
                self._engine.release(fence)
            case state.Report(message=message):
                self._send(ToRouter(attempt.router, message))

    # --- reports -----------------------------------------------------------------------------------------------------

    def load(self) -> Load:
        ledger = self._engine.ledger
        return Load(
            queued=self._engine.queued,
            queued_tokens=self._engine.queued_tokens,
            running=len(self._attempts) - self._engine.queued,
            pages_used=self._engine.pages_used,
            pages_total=ledger.total,
            pages_cached=self._engine.prefixes.evictable,
            transfers=self._sender.active,
            steps=self._engine.steps,
            owners=self._engine.owners(),
            stale_messages=self._stale + sum(self._sender.stale.values()),
        )

    def close(self) -> None:
        self._on_close()

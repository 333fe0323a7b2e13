"""The step loop's work on a decode worker: feeds one `DecodeMachine` per attempt and carries out what they ask for.

Owns the attempts and their queue for pages. The pages belong to the engine's ledger, the leases to `HandoffReceiver`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

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
from cluster.errors import Draining, ErrorInfo, OutOfMemory, RequestError, StaleFence, WorkerLost
from cluster.logging import get_logger
from cluster.messages import (
    Aborted,
    AttemptFailed,
    CancelAttempt,
    DeathWitnessed,
    DecodeAttempt,
    Done,
    Emitted,
    Fence,
    Load,
    Message,
    Offer,
    Role,
    Tokens,
)
from decode_worker import decode_state as state
from decode_worker.decode_state import DecodeMachine, DecodeState
from decode_worker.quarantine_state import Counted, QuarantineWatch, Warn
from engine.engine import Engine, StepPlan, StepResult
from engine.pages import Owner, OwnerKind
from engine.sequence import Sequence
from kv_transfer import receiver as transfer
from kv_transfer.receiver import HandoffReceiver

log = get_logger(__name__)

EARLY_OFFER_SECONDS = 10.0
"""An offer whose attempt has not come from the router by then is refused: the router is gone."""
ENDED_MEMORY = 4096
"""Fences of ended attempts that are remembered, so that what comes late for one is refused at once."""
LINGER_SECONDS = 0.001
"""How long a step may wait for KV that has arrived to be verified: a sequence that misses it waits for all of it."""
NO_MEMORY = OutOfMemory("the decode worker's device has no memory for a step with this request").to_info()
PeerMessage = FromPeer | PeerUp | PeerDown
PAGELESS_STATES = (DecodeState.RESERVING, DecodeState.OFFERED)
WAITING_STATES = (*PAGELESS_STATES, DecodeState.AWAITING_KV)
CLOSING = "too many pages of this worker are in quarantine: its engine process is about to start anew"


@dataclass(slots=True)
class _Attempt:
    router: str
    machine: DecodeMachine


class DecodeLoop:
    """A `cluster.step_loop.StepHandler`. `send` puts a message into the channel to the control process, at once;
    `receive_only` takes messages of some kinds out of it, see `EngineChannel`.

    KV that arrives does not wait for the step under way: between two layers the receiver is given what has come for it,
    so that a DONE is verified and answered at once, and the sequence is in the next step, not in the one after.

    An engine that computes ahead gives a step's result with the next step. So an attempt that ends meanwhile is still
    in a step; the engine drops what it computes for it, and keeps its pages until then.
    """

    def __init__(
        self,
        engine: Engine,
        receiver: HandoffReceiver,
        send: Callable[[Message], None],
        receive_only: Callable[[tuple[type[PeerMessage], ...]], list[PeerMessage]],
        clock: Clock,
        epoch: int,
        on_close: Callable[[], None],
        quarantine: QuarantineWatch,
    ) -> None:
        self._engine = engine
        self._receiver = receiver
        self._send = send
        self._receive_only = receive_only
        self._clock = clock
        self._epoch = epoch
        self._on_close = on_close
        self._quarantine = quarantine
        self._attempts: dict[Fence, _Attempt] = {}
        self._wanting: dict[Fence, Sequence] = {}
        """Offered attempts that wait for pages."""
        self._early: dict[Fence, float] = {}
        """Offers that came before their attempt, and when."""
        self._ended: OrderedDict[Fence, None] = OrderedDict()
        self._stale = 0

    # --- messages ----------------------------------------------------------------------------------------------------

    def handle(self, message: EngineMessage, now: float) -> None:
        if isinstance(message, FromRouter):
            self._from_router(message, now)
        elif isinstance(message, FromPeer | PeerUp | PeerDown):
            self._from_peer(message)
        elif isinstance(message, RouterGone):
            for fence in [fence for fence, attempt in self._attempts.items() if attempt.router == message.router]:
                self._feed(fence, state.Cancelled("the router's connection broke"), now)

    def _from_peer(self, message: PeerMessage) -> None:
        """Touches the receiver only: it may come in the middle of a step."""
        if isinstance(message, PeerUp):
            self._receiver.peer_up(message.hello)
        elif isinstance(message, PeerDown):
            self._receiver.peer_down(message.worker, message.epoch)
        elif isinstance(message.message, Offer | Done | Aborted | DeathWitnessed) and not self._is_lie(message.message):
            self._receiver.receive(message.worker, message.epoch, message.message)
        else:
            self._stale += 1

    def _is_lie(self, message: Offer | Done | Aborted | DeathWitnessed) -> bool:
        """A first token that the model does not have would end the step that embeds it, and all others' with it."""
        return isinstance(message, Done) and message.first_token >= self._engine.model.vocab_size

    def _from_router(self, envelope: FromRouter, now: float) -> None:
        message = envelope.message
        if isinstance(message, CancelAttempt):
            if message.fence in self._attempts:
                self._feed(message.fence, state.Cancelled(message.reason), now)
        elif isinstance(message, DecodeAttempt):
            self._begin(envelope.router, message, now if envelope.received_at is None else envelope.received_at, now)

    def _begin(self, router: str, message: DecodeAttempt, received_at: float, now: float) -> None:
        fence = message.fence
        if fence in self._attempts:
            self._stale += 1
            return
        try:
            self._require_our_life(fence)
            self._require_new(fence)
            self._engine.require_computable(_sequence(message, now))
            if self._quarantine.closing:
                raise Draining(CLOSING)
        except (RequestError, StaleFence, Draining) as error:
            self._send(ToRouter(router, AttemptFailed(fence, Role.DECODE, Role.DECODE, error.to_info())))
            return
        attempt = self._attempts[fence] = _Attempt(router, DecodeMachine(message, received_at))
        log.debug("reserving", request=fence.request, tokens=len(message.prompt), prefill=message.prefill)
        for action in attempt.machine.begin():
            self._carry_out(fence, attempt, action, now)
        if self._early.pop(fence, None) is not None:
            self._feed(fence, state.OfferArrived(), now)

    def _require_our_life(self, fence: Fence) -> None:
        if fence.decode_epoch != self._epoch:
            self._stale += 1
            raise StaleFence(f"this worker's epoch is {self._epoch}: the attempt is for another life of it")

    def _require_new(self, fence: Fence) -> None:
        """For an attempt that has ended here no offer will come any more: it would wait for one without end."""
        if fence in self._ended:
            self._stale += 1
            raise StaleFence(f"the attempt {fence} has ended here")

    # --- steps -------------------------------------------------------------------------------------------------------

    def step(self, now: float) -> bool:
        self._receiver.linger(LINGER_SECONDS)
        events = self._receiver.poll(now)
        for event in events:
            self._from_receiver(event, now)
        while (retracted := self._engine.retract()) is not None:
            self._feed(retracted, state.Retracted(), now)
        self._watch_quarantine(now)
        self._lease_pages(now)
        self._refuse_orphans(now)
        plan = self._engine.plan(now)
        for sequence in plan.started if plan is not None else ():
            if self._attempts[sequence.key].machine.accepts(state.PrefillStarted):
                self._feed(sequence.key, state.PrefillStarted(sequence.cached), now)
        result = self._compute(plan)
        if result is not None:
            self._tell(result)
        return bool(events) or plan is not None or result is not None

    def _compute(self, plan: StepPlan | None) -> StepResult | None:
        between_layers = self._attend_to_handoffs if self._receiver.active else _nothing
        return self._engine.compute(plan, between_layers)

    def _tell(self, result: StepResult) -> None:
        now = self._clock.now()
        for fence in result.refused:
            known = self._attempts.get(fence)
            if known is not None and known.machine.accepts(state.Refused):  # it may have ended meanwhile
                self._feed(fence, state.Refused(NO_MEMORY), now)
        for progress in result.progress:
            self._feed(progress.key, state.ChunkComputed(), now)
        self._emit(result)
        for sampled in result.sampled:
            self._feed(sampled.key, state.Sampled(result.batch_size, sampled.finished), now)

    def _attend_to_handoffs(self) -> None:
        for message in self._receive_only((FromPeer, PeerUp, PeerDown)):
            self._from_peer(message)
        self._receiver.advance()

    def _emit(self, result: StepResult) -> None:
        """One message per router and step."""
        by_router: dict[str, list[Emitted]] = {}
        for sampled in result.sampled:
            emitted = Emitted(sampled.key, sampled.offset, sampled.token, sampled.logprobs)
            by_router.setdefault(self._attempts[sampled.key].router, []).append(emitted)
        for router, tokens in by_router.items():
            self._send(ToRouter(router, Tokens(tokens)))

    def _from_receiver(self, event: transfer.ReceiverEvent, now: float) -> None:
        match event:
            case transfer.OfferArrived(fence=fence):
                self._offered(fence, now)
            case transfer.KVArrived(fence=fence, first_token=token, verify_seconds=seconds):
                self._feed(fence, state.KVArrived(token, seconds), now)
            case transfer.HandoffFailed(fence=fence, error=error, blame=blame):
                self._early.pop(fence, None)
                if fence in self._attempts:
                    self._feed(fence, state.HandoffFailed(error, blame), now)
            case transfer.LeaseEnded(fence=fence):
                self._engine.ledger.release(Owner(OwnerKind.QUARANTINE, fence))

    def _offered(self, fence: Fence, now: float) -> None:
        if fence in self._attempts:
            self._feed(fence, state.OfferArrived(), now)
        elif fence in self._ended:
            self._receiver.cancel(fence, ErrorInfo("Cancelled", "the attempt has ended here"))
        else:
            self._early[fence] = now

    def _refuse_orphans(self, now: float) -> None:
        for fence in [fence for fence, since in self._early.items() if now - since > EARLY_OFFER_SECONDS]:
            del self._early[fence]
            self._receiver.refuse(fence, WorkerLost("no router sent this attempt to the decode worker").to_info())

    def _watch_quarantine(self, now: float) -> None:
        """Raises `QuarantineFull` when this process has to end for it."""
        ledger = self._engine.ledger
        fences = self._receiver.quarantined
        pages = sum(len(ledger.pages_of(Owner(OwnerKind.QUARANTINE, fence))) for fence in fences)
        for action in self._quarantine.handle(Counted(pages, len(self._attempts)), now):
            if isinstance(action, Warn):
                log.warning(action.message)
            else:
                raise action.error
        if self._quarantine.closing:
            self._give_back_waiting(now)

    def _give_back_waiting(self, now: float) -> None:
        """What has no pages yet will have to begin elsewhere."""
        error = Draining(CLOSING).to_info()
        waiting = [fence for fence, attempt in self._attempts.items() if attempt.machine.state in PAGELESS_STATES]
        for fence in waiting:
            self._receiver.refuse(fence, error)
            self._feed(fence, state.HandoffFailed(error, Role.DECODE), now)

    def _lease_pages(self, now: float) -> None:
        """Grants pages in the pool's order; the first that must wait holds up the rest, so that large ones get some."""
        while self._wanting:
            sequence = self._engine.first(self._wanting.values(), now)
            lease = self._engine.lease(sequence)
            if lease is None:
                return
            self._receiver.grant(sequence.key, lease.pages, lease.skip_tokens)
            del self._wanting[sequence.key]
            self._feed(sequence.key, state.PagesLeased(), now)

    def _feed(self, fence: Fence, event: object, now: float) -> None:
        attempt = self._attempts[fence]
        for action in attempt.machine.handle(event, now):
            self._carry_out(fence, attempt, action, now)
        if attempt.machine.state is DecodeState.FINISHED:
            del self._attempts[fence]
            self._wanting.pop(fence, None)
            self._ended[fence] = None
            if len(self._ended) > ENDED_MEMORY:
                self._ended.popitem(last=False)

    def _carry_out(self, fence: Fence, attempt: _Attempt, action: state.Action, now: float) -> None:
        ledger = self._engine.ledger
        match action:
            case state.LeasePages():
                self._wanting[fence] = _sequence(attempt.machine.attempt, now)
            case state.Submit(first_token=token):
                self._submit(attempt.machine.attempt, token, now)
            case state.StopHandoff(error=error):
                self._receiver.cancel(fence, error)
            case state.QuarantinePages():
                ledger.move(Owner(OwnerKind.LEASE, fence), Owner(OwnerKind.QUARANTINE, fence))
                ledger.release(Owner(OwnerKind.RESERVED, fence))
                self._engine.prefixes.release(fence)
            case state.DropSequence():
                self._engine.cancel(fence)
            case state.ReleasePages():
                self._engine.release(fence)
            case state.Report(message=message):
                self._send(ToRouter(attempt.router, message))

    def _submit(self, attempt: DecodeAttempt, first_token: int | None, now: float) -> None:
        """`first_token` None: it is prefilled here. Else KV of all tokens before it is in the leased pages."""
        if first_token is not None:
            sequence_owner = Owner(OwnerKind.SEQUENCE, attempt.fence)
            self._engine.ledger.move(Owner(OwnerKind.LEASE, attempt.fence), sequence_owner)
            self._engine.ledger.move(Owner(OwnerKind.RESERVED, attempt.fence), sequence_owner)
        self._engine.submit(_sequence(attempt, now, first_token))

    # --- reports -----------------------------------------------------------------------------------------------------

    def load(self) -> Load:
        ledger = self._engine.ledger
        owners = self._engine.owners()
        awaiting = sum(attempt.machine.state in WAITING_STATES for attempt in self._attempts.values())
        return Load(
            queued=awaiting + self._engine.queued,
            queued_tokens=self._engine.queued_tokens,
            running=self._engine.running,
            pages_used=self._engine.pages_used,
            pages_total=ledger.total,
            pages_cached=self._engine.prefixes.evictable,
            pages_quarantined=owners.get(OwnerKind.QUARANTINE.value, 0),
            transfers=self._receiver.active,
            steps=self._engine.steps,
            owners=owners,
            stale_messages=self._stale + sum(self._receiver.stale.values()),
            ready=not self._quarantine.closing,
            draining=self._quarantine.closing,
        )

    def close(self) -> None:
        self._on_close()


def _sequence(attempt: DecodeAttempt, now: float, first_token: int | None = None) -> Sequence:
    """With KV of all tokens before `first_token`; without one, of none."""
    before = len(attempt.prompt) + len(attempt.output)
    return Sequence(
        attempt.fence,
        attempt.prompt,
        [*attempt.output] if first_token is None else [*attempt.output, first_token],
        attempt.sampling,
        computed=0 if first_token is None else before,
        arrived=now,
        priority=attempt.priority,
        attempt=attempt.fence.attempt,
    )


def _nothing() -> None:
    """Between two layers, where no KV is awaited: decoding pays for nothing."""

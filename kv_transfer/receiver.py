"""The decode side's shell: one `ReceiverLease` per fence, between the step loop, the peers and the transfer thread."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Union

from cluster import process_identity
from cluster.clock import Clock
from cluster.errors import ErrorInfo, IllegalTransition, StaleFence
from cluster.layout import KVLayout
from cluster.messages import (
    Abort,
    Aborted,
    Ack,
    DeathAsked,
    DeathWitnessed,
    Done,
    Fence,
    Offer,
    PeerHello,
    PeerMessage,
    ProcessIdentity,
    Role,
)
from cluster.shards import Grid
from kv_transfer import receiver_state as state
from kv_transfer.driver import DigestsComputed, Result, Settled, TransferPort
from kv_transfer.group import RankPort, TransferGroup
from kv_transfer.peers import Peers
from kv_transfer.receiver_state import ReceiverLease, ReceiverState
from kv_transfer.repeats import LIFETIME_SECONDS

PROOF_SECONDS = 0.25
"""Time between two questions to the kernel whether a quarantined page's writer is dead."""
WITNESS_SECONDS = 1.0
"""The same, to other hosts' kernels: by way of the writer's neighbours, or of its successor."""
REMEMBERED_ENDS = 4096
"""Handoffs whose end is remembered, to answer repeated messages. Connections keep their order, so repetitions come
within one reconnection; this is far more than can be under way."""

LeaseEvent = Union[
    state.OfferedAgain, state.GrantPages, state.GivenUp, state.DoneArrived, state.Verified, state.AbortedArrived,
    state.PeerUp, state.PeerDown, state.WriterFenced, state.DeadlinePassed, state.RepeatDue, state.PagesSettled,
]  # fmt: skip


@dataclass(frozen=True)
class OfferArrived:
    """A prefill worker has begun on this request: `grant` pages for `tokens` tokens, or `refuse`, when you know."""

    fence: Fence
    tokens: int


@dataclass(frozen=True)
class KVArrived:
    """The KV is in the granted pages and verified; they are ours again. `verify_seconds`: since DONE."""

    fence: Fence
    first_token: int
    verify_seconds: float


@dataclass(frozen=True)
class HandoffFailed:
    """It will not arrive. If pages were granted, they are not ours before `LeaseEnded`."""

    fence: Fence
    error: ErrorInfo
    blame: Role | None


@dataclass(frozen=True)
class LeaseEnded:
    """After a failure or a cancel: the granted pages may be reused from now on, and not before."""

    fence: Fence


ReceiverEvent = Union[OfferArrived, KVArrived, HandoffFailed, LeaseEnded]


@dataclass
class _Lease:
    machine: ReceiverLease
    prefill: str
    writers: Grid
    """The prefill worker's ranks."""

    @property
    def writer(self) -> tuple[str, int]:
        return self.prefill, self.machine.fence.prefill_epoch

    @property
    def ended(self) -> bool:
        return self.machine.state is ReceiverState.ENDED

    @property
    def quarantined(self) -> bool:
        return self.machine.state in (ReceiverState.QUARANTINED, ReceiverState.SETTLING)


class HandoffReceiver:
    """Takes KV pages over. All methods are for the step loop; none of them blocks, but `linger`.

    `send(worker, epoch, message)` relays a control message to a peer. `thread` is this receiver's own, `followers`
    are the other ranks' of our worker. `epoch` is our own instance's. `is_dead` is proof of a process's death. A
    handoff that brings no KV for `lifetime` seconds, longer than any request, fails. Granted pages belong to their
    writer until `poll` returns `KVArrived` or `LeaseEnded` for their fence; exactly one of the two comes. `stale`
    counts refused messages by type.
    """

    def __init__(
        self,
        thread: TransferPort,
        layout: KVLayout,
        send: Callable[[str, int, PeerMessage], None],
        clock: Clock,
        digests: bool,
        *,
        epoch: int,
        lifetime: float = LIFETIME_SECONDS,
        is_dead: Callable[[ProcessIdentity], bool] = process_identity.is_dead,
        followers: Sequence[RankPort] = (),
    ) -> None:
        self._transfers = TransferGroup(thread, followers, layout)
        self._layout = layout
        self._send = send
        self._clock = clock
        self._with_digests = digests
        self._lifetime = lifetime
        self._is_dead = is_dead
        self._peers = Peers(Role.DECODE, epoch)
        self._leases: dict[Fence, _Lease] = {}
        self._processes: dict[tuple[str, int], set[ProcessIdentity]] = {}
        """Of each writer, all its ranks' that are not known to be dead."""
        self._answers: OrderedDict[Fence, Ack | Abort] = OrderedDict()
        self._events: list[ReceiverEvent] = []
        self._proof_at = 0.0
        self._witness_at = 0.0

    @property
    def stale(self) -> dict[str, int]:
        return self._peers.stale

    @property
    def active(self) -> int:
        """Handoffs that may still bring KV."""
        return sum(not lease.ended and not lease.quarantined for lease in self._leases.values())

    @property
    def quarantined(self) -> list[Fence]:
        """Handoffs that have failed but whose pages are still their writer's."""
        return [fence for fence, lease in self._leases.items() if lease.quarantined]

    @property
    def busy(self) -> bool:
        """Whether the next `poll` returns something for certain. What comes later announces itself by `wake`."""
        return bool(self._events)

    # --- peers -------------------------------------------------------------------------------------------------------

    def peer_up(self, hello: PeerHello) -> None:
        """A prefill worker is connected, its hello checked. A new epoch proves nothing about the one before."""
        before = self._peers.up(hello)
        self._processes.setdefault((hello.worker, hello.epoch), {rank.process for rank in hello.ranks})
        if before is not None and before.epoch != hello.epoch:
            self._tell_all(before.worker, before.epoch, state.PeerDown())
        self._tell_all(hello.worker, hello.epoch, state.PeerUp())

    def peer_down(self, worker: str, epoch: int) -> None:
        """Its connection broke. Ignored for an instance that was replaced already."""
        if self._peers.down(worker, epoch):
            self._tell_all(worker, epoch, state.PeerDown())

    def writer_fenced(self, worker: str, epoch: int) -> None:
        """Proof that this instance can't write any more: its process is dead. Ends all its leases."""
        self._tell_all(worker, epoch, state.WriterFenced())

    def receive(self, worker: str, epoch: int, message: Offer | Done | Aborted | DeathWitnessed) -> None:
        """A control message of a prefill worker; one that does not fit is refused and counted."""
        if isinstance(message, DeathWitnessed):
            self._hear_witness(worker, epoch, message)
            return
        if not self._peers.accepts(worker, epoch, message):
            return
        lease = self._leases.get(message.fence)
        if lease is None or lease.ended:
            self._receive_unknown(worker, epoch, message)
            return
        event: LeaseEvent
        if isinstance(message, Offer):
            event = state.OfferedAgain()
        elif isinstance(message, Done):
            event = state.DoneArrived(message.first_token, tuple(message.digests))
        else:
            event = state.AbortedArrived(message.error, message.blame)
        if lease.machine.accepts(type(event)):
            self._handle(lease, event)
        else:
            self._peers.refuse(message)

    # --- our worker's decisions --------------------------------------------------------------------------------------

    def grant(self, fence: Fence, pages: Sequence[int], skip_tokens: int = 0) -> None:
        """Leases `pages`, in order, to the writer. KV of the first `skip_tokens` tokens (whole pages) is not sent.

        If the offer has failed in the meantime, the pages come back by `LeaseEnded`, behind the `HandoffFailed`.
        Raises `ValueError` for a wrong number of pages, `IllegalTransition` for a fence that is not on offer.
        """
        lease = self._leases.get(fence)
        if lease is None:
            raise IllegalTransition(f"{fence} is not on offer, or its end was told")
        self._handle(lease, state.GrantPages(tuple(pages), skip_tokens))

    def refuse(self, fence: Fence, error: ErrorInfo) -> None:
        """Declines an offer, by our own fault. No event follows."""
        self._give_up(fence, error, Role.DECODE)

    def cancel(self, fence: Fence, error: ErrorInfo) -> None:
        """Gives it up; nobody is to blame. The only event that follows is `LeaseEnded`, if pages were granted.
        Unknown fences are ignored."""
        self._give_up(fence, error, None)

    def poll(self, now: float) -> list[ReceiverEvent]:
        """Picks up what the transfer thread has done. Raises whatever ended that thread. Call it a few times a second
        even when idle: it looks for proof that the writers of quarantined pages are dead."""
        self.advance()
        if now >= self._proof_at:
            self._proof_at = now + PROOF_SECONDS
            self._look_for_dead_writers(now)
        for lease in list(self._leases.values()):
            due = lease.machine.timer(now)
            if due is not None:
                self._handle(lease, due)
        for fence in [fence for fence, lease in self._leases.items() if lease.ended]:
            del self._leases[fence]
        events, self._events = self._events, []
        return events

    def advance(self) -> None:
        """Picks up what the transfer thread has done, and answers the writers. What our worker is to hear of it waits
        for the next `poll`: so this may come at any moment, in the middle of a step too, and so may `receive` and the
        news of peers. Raises whatever ended that thread."""
        for result in self._transfers.results():
            self._finish(result)

    def linger(self, seconds: float) -> None:
        """Waits, at most so long, until what has been written is verified: so it is in the step that is about to begin,
        and not in the one after."""
        until = self._clock.now() + seconds
        while any(lease.machine.state is ReceiverState.VERIFYING for lease in self._leases.values()):
            left = until - self._clock.now()
            if left <= 0 or not self._transfers.wait(left):
                return
            self.advance()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _receive_unknown(self, worker: str, epoch: int, message: Offer | Done | Aborted) -> None:
        """The first of a handoff, or one that came after its end."""
        answer = self._answers.get(message.fence)
        if answer is not None:
            if not isinstance(message, Aborted):
                self._relay(worker, epoch, answer)
        elif isinstance(message, Offer):
            expires_at = self._clock.now() + self._lifetime
            machine = ReceiverLease(
                message.fence, message.tokens, self._layout.page_size, self._with_digests, expires_at
            )
            self._leases[message.fence] = _Lease(machine, worker, self._peers.hello(worker).layout.grid)
            self._events.append(OfferArrived(message.fence, message.tokens))
        else:
            self._peers.refuse(message)
            if isinstance(message, Done):
                error = StaleFence(f"nothing is known of {message.fence}").to_info()
                self._relay(worker, epoch, Abort(message.fence, error, Role.DECODE))

    def _give_up(self, fence: Fence, error: ErrorInfo, blame: Role | None) -> None:
        lease = self._leases.get(fence)
        if lease is None:
            return
        arrived = any(isinstance(event, KVArrived) and event.fence == fence for event in self._events)
        # What our worker has not heard yet it need not hear any more, but for the return of its pages.
        self._events = [event for event in self._events if event.fence != fence or isinstance(event, LeaseEnded)]
        if arrived:
            self._events.append(LeaseEnded(fence))
        self._handle(lease, state.GivenUp(error, blame))

    def _tell_all(self, worker: str, epoch: int, event: LeaseEvent) -> None:
        """News of a writer, to all its leases that are not over."""
        for lease in self._of(worker, epoch):
            self._handle(lease, event)

    def _of(self, worker: str, epoch: int) -> Iterable[_Lease]:
        return [lease for lease in self._leases.values() if lease.writer == (worker, epoch) and not lease.ended]

    def _finish(self, result: Result) -> None:
        """What we asked the transfer thread for. A lease that was dropped while its pages were read is gone."""
        lease = self._leases.get(result.fence)
        if isinstance(result, DigestsComputed):
            if lease is not None and lease.machine.accepts(state.Verified):
                self._handle(lease, state.Verified(result.digests))
        else:
            assert isinstance(result, Settled)
            assert lease is not None
            self._handle(lease, state.PagesSettled())

    def _look_for_dead_writers(self, now: float) -> None:
        """Also forgets the processes of writers that are neither connected nor hold pages of ours."""
        ask_around = now >= self._witness_at
        if ask_around:
            self._witness_at = now + WITNESS_SECONDS
        for writer, processes in list(self._processes.items()):
            leases = self._of(*writer)
            if any(lease.machine.state is ReceiverState.QUARANTINED for lease in leases):
                processes -= {process for process in processes if self._is_dead(process)}
                if not processes:
                    self.writer_fenced(*writer)
                elif ask_around:
                    self._ask_witnesses(processes)
            elif not leases and not self._peers.connected(*writer):
                del self._processes[writer]

    def _ask_witnesses(self, processes: Iterable[ProcessIdentity]) -> None:
        for process in processes:
            for witness in self._peers.witnesses(process):
                self._send(witness.worker, witness.epoch, DeathAsked(process))

    def _hear_witness(self, worker: str, epoch: int, message: DeathWitnessed) -> None:
        """Only who is connected and sees that process can know."""
        seen = any((peer.worker, peer.epoch) == (worker, epoch) for peer in self._peers.witnesses(message.process))
        if not seen:
            self._peers.refuse(message)
            return
        for writer, processes in list(self._processes.items()):
            if message.process in processes:
                processes.remove(message.process)
                if not processes:
                    self.writer_fenced(*writer)

    def _handle(self, lease: _Lease, event: LeaseEvent) -> None:
        machine = lease.machine
        for action in machine.handle(event, self._clock.now()):
            if isinstance(action, state.Send):
                self._relay(*lease.writer, action.message)
            elif isinstance(action, state.Expect):
                self._transfers.expect(machine.fence)
            elif isinstance(action, state.Verify):
                self._transfers.verify(machine.fence, action.pages, lease.writers)
            elif isinstance(action, state.DrainWrites):
                self._transfers.settle(machine.fence)
            else:
                self._events.append(_as_event(machine.fence, action))
        if lease.ended and machine.answer is not None:
            self._answers[machine.fence] = machine.answer
            if len(self._answers) > REMEMBERED_ENDS:
                self._answers.popitem(last=False)

    def _relay(self, worker: str, epoch: int, message: PeerMessage) -> None:
        """Drops what is for an instance that is not connected: when it comes back, one of us repeats it."""
        if self._peers.connected(worker, epoch):
            self._send(worker, epoch, message)


def _as_event(fence: Fence, action: state.Accept | state.Fail | state.EndLease) -> ReceiverEvent:
    if isinstance(action, state.Accept):
        return KVArrived(fence, action.first_token, action.verify_seconds)
    if isinstance(action, state.Fail):
        return HandoffFailed(fence, action.error, action.blame)
    return LeaseEnded(fence)

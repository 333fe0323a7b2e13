"""The prefill side's shell: one `SenderHandoff` per fence, between the step loop, the peers and the transfer thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Union

from cluster.clock import Clock
from cluster.errors import ErrorInfo, IllegalTransition, StaleFence
from cluster.layout import KVLayout
from cluster.messages import Abort, Aborted, Ack, Fence, Grant, HandoffMessage, PeerHello, Role
from cluster.timings import HandoffTimings
from kv_transfer import sender_state as state
from kv_transfer.driver import TransferPort, WritesEnded
from kv_transfer.group import RankPort, TransferGroup
from kv_transfer.peers import Peers, instance
from kv_transfer.plan import WritePlan
from kv_transfer.repeats import LIFETIME_SECONDS
from kv_transfer.sender_state import SenderHandoff, SenderState

CONNECT_SECONDS = 5.0
"""How long a handoff waits for its decode worker to be connected; covers a redial, not a restart."""

SenderEvent = Union[
    state.PeerUp, state.PeerDown, state.PeerReplaced, state.DeadlinePassed, state.RepeatDue, state.Granted,
    state.Computed, state.Finished, state.BatchEnded, state.Acked, state.AbortAsked, state.Cancelled,
]  # fmt: skip


@dataclass(frozen=True)
class HandoffEnded:
    """Our source pages may be released now, and not before. `error` None: the receiver has taken over.

    `blame` None with an error: it was cancelled. `timings` only of a good end.
    """

    fence: Fence
    error: ErrorInfo | None
    blame: Role | None
    timings: HandoffTimings | None


@dataclass
class _Handoff:
    machine: SenderHandoff
    decode: str

    @property
    def peer(self) -> str:
        return instance(self.decode, self.machine.fence.decode_epoch)

    @property
    def ended(self) -> bool:
        return self.machine.state is SenderState.ENDED


class HandoffSender:
    """Hands KV pages over. All methods are for the step loop; none of them blocks, but `linger`.

    `send(worker, epoch, message)` relays a control message to a peer. `thread` is this sender's own, `followers`
    are the other ranks' of our worker. `epoch` is our own instance's. Per handoff: `offer`, then `computed` after
    each chunk and `finish` after the last one, or `cancel` at any time; until `poll` returns its `HandoffEnded`,
    the pages given to `computed` must neither change nor be reused. One that is not over after `lifetime` seconds,
    longer than any request, fails. `stale` counts refused messages by type.
    """

    def __init__(
        self,
        thread: TransferPort,
        layout: KVLayout,
        send: Callable[[str, int, HandoffMessage], None],
        clock: Clock,
        digests: bool,
        *,
        epoch: int,
        connect_timeout: float = CONNECT_SECONDS,
        lifetime: float = LIFETIME_SECONDS,
        followers: Sequence[RankPort] = (),
    ) -> None:
        self._transfers = TransferGroup(thread, followers, layout)
        self._layout = layout
        self._send = send
        self._clock = clock
        self._with_digests = digests
        self._connect_timeout = connect_timeout
        self._lifetime = lifetime
        self._peers = Peers(Role.PREFILL, epoch)
        self._handoffs: dict[Fence, _Handoff] = {}
        self._ended: list[HandoffEnded] = []

    @property
    def stale(self) -> dict[str, int]:
        return self._peers.stale

    @property
    def active(self) -> int:
        """Handoffs whose pages are not released yet."""
        return len(self._handoffs)

    @property
    def busy(self) -> bool:
        """Whether the next `poll` returns something for certain. What comes later announces itself by `wake`."""
        return bool(self._ended)

    # --- peers -------------------------------------------------------------------------------------------------------

    def peer_up(self, hello: PeerHello) -> None:
        """A decode worker is connected, its hello checked. Repeats for the same instance are fine."""
        before = self._peers.up(hello)
        if before is not None and before.epoch != hello.epoch:
            self._transfers.disconnect(instance(before.worker, before.epoch))
        descriptors = [rank.descriptor for rank in hello.ranks]
        self._transfers.connect(instance(hello.worker, hello.epoch), descriptors, hello.layout.grid)
        for handoff in self._to(hello.worker):
            self._tell(handoff, self._news(handoff, hello.epoch))

    def peer_down(self, worker: str, epoch: int) -> None:
        """Its connection broke. Ignored for an instance that was replaced already."""
        if not self._peers.down(worker, epoch):
            return
        self._transfers.disconnect(instance(worker, epoch))
        for handoff in self._to(worker):
            self._tell(handoff, state.PeerDown())

    # --- our own work ------------------------------------------------------------------------------------------------

    def offer(self, fence: Fence, decode: str, tokens: int) -> None:
        """Announces `tokens` tokens of KV to the decode worker; waits for its connection if need be."""
        self._peers.require_own(fence)
        if fence in self._handoffs:
            raise IllegalTransition(f"{fence} was offered before")
        now = self._clock.now()
        plan = WritePlan(tokens, self._layout.page_size)
        machine = SenderHandoff(
            fence,
            plan,
            self._layout.page_bytes,
            self._connect_timeout,
            now,
            self._with_digests,
            expires_at=now + self._lifetime,
        )
        handoff = self._handoffs[fence] = _Handoff(machine, decode)
        connected = self._peers.epoch_of(decode)
        if connected is not None:
            self._tell(handoff, self._news(handoff, connected))

    def computed(self, fence: Fence, pages: Sequence[int], tokens: int) -> None:
        """KV of the first `tokens` tokens is in `pages`, our page numbers in order; cumulative. Full pages go out."""
        self._handle(self._known(fence), state.Computed(pages, tokens))

    def finish(self, fence: Fence, first_token: int) -> None:
        """All tokens are computed, and the next one sampled."""
        self._handle(self._known(fence), state.Finished(first_token))

    def cancel(self, fence: Fence, error: ErrorInfo) -> None:
        """Gives it up; its `HandoffEnded` comes when no write is under way. Unknown fences are ignored."""
        handoff = self._handoffs.get(fence)
        if handoff is not None:
            self._tell(handoff, state.Cancelled(error))

    def receive(self, worker: str, epoch: int, message: Grant | Ack | Abort) -> None:
        """A control message of a decode worker; one that does not fit is refused and counted."""
        if not self._peers.accepts(worker, epoch, message):
            return
        handoff = self._handoffs.get(message.fence)
        if handoff is None:
            self._answer_unknown(worker, epoch, message)
            return
        event: SenderEvent
        if isinstance(message, Grant):
            event = state.Granted(message)
        elif isinstance(message, Ack):
            event = state.Acked()
        else:
            event = state.AbortAsked(message.error, message.blame)
        if handoff.machine.accepts(type(event)):
            self._handle(handoff, event)
        else:
            self._peers.refuse(message)

    def poll(self, now: float) -> list[HandoffEnded]:
        """What has ended since the last call. Raises whatever ended the transfer thread."""
        self.advance(now)
        ended_now, self._ended = self._ended, []
        for event in ended_now:
            del self._handoffs[event.fence]
        return ended_now

    def advance(self, now: float) -> None:
        """Picks up what the transfer thread has done, and goes on. What ends by it stays known until the next `poll`:
        so this may come at any moment, in the middle of a step too. Raises whatever ended that thread."""
        for result in self._transfers.results():
            assert isinstance(result, WritesEnded)
            ended = state.BatchEnded(result.batch, result.error, result.digests, result.started, result.ended)
            self._handle(self._handoffs[result.fence], ended)
        for handoff in list(self._handoffs.values()):
            due = handoff.machine.timer(now)
            if due is not None:
                self._handle(handoff, due)

    def linger(self, seconds: float) -> None:
        """Waits, at most so long, until what is computed to its end is written, and so DONE has left. A step that
        begins before would hold it up: on a CPU it wants the transfer thread's core, and it looks up between two layers
        only."""
        until = self._clock.now() + seconds
        while any(handoff.machine.at_its_last_write for handoff in self._handoffs.values()):
            left = until - self._clock.now()
            if left <= 0 or not self._transfers.wait(left):
                return
            self.advance(self._clock.now())

    # --- inside ------------------------------------------------------------------------------------------------------

    def _to(self, worker: str) -> Iterable[_Handoff]:
        return [handoff for handoff in self._handoffs.values() if handoff.decode == worker]

    def _known(self, fence: Fence) -> _Handoff:
        if fence not in self._handoffs:
            raise IllegalTransition(f"{fence} was never offered, or its end was told")
        return self._handoffs[fence]

    @staticmethod
    def _news(handoff: _Handoff, connected: int) -> SenderEvent:
        """What the connection of instance `connected` means for a handoff to its worker. Epochs grow with time."""
        if connected == handoff.machine.fence.decode_epoch:
            return state.PeerUp()
        return state.PeerReplaced() if connected > handoff.machine.fence.decode_epoch else state.PeerDown()

    def _tell(self, handoff: _Handoff, event: SenderEvent) -> None:
        """For news that concern a handoff only in some states."""
        if handoff.machine.accepts(type(event)):
            self._handle(handoff, event)

    def _handle(self, handoff: _Handoff, event: SenderEvent) -> None:
        fence = handoff.machine.fence
        for action in handoff.machine.handle(event, self._clock.now()):
            if isinstance(action, state.Send):
                self._relay(handoff.decode, fence.decode_epoch, action.message)
            elif isinstance(action, state.Post):
                self._transfers.write(fence, handoff.peer, action.batch)
            else:
                self._ended.append(HandoffEnded(fence, action.error, action.blame, action.timings))

    def _answer_unknown(self, worker: str, epoch: int, message: Grant | Ack | Abort) -> None:
        """Ended, or never offered: either way no write is under way, and the receiver may have to know that."""
        if isinstance(message, Ack):
            self._peers.refuse(message)
            return
        error = StaleFence(f"nothing is known of {message.fence}: no write is under way").to_info()
        self._relay(worker, epoch, Aborted(message.fence, error))

    def _relay(self, worker: str, epoch: int, message: HandoffMessage) -> None:
        """Drops what is for an instance that is not connected: when it comes back, it asks again."""
        if self._peers.connected(worker, epoch):
            self._send(worker, epoch, message)

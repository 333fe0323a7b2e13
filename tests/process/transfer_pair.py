"""A sender and a receiver over a real transfer engine, for tests of whole handoffs and of what never must happen."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from cluster.messages import DeathAsked, Fence, decode
from kv_transfer.driver import WRITE_TIMEOUT_SECONDS
from kv_transfer.receiver import KVArrived, OfferArrived
from kv_transfer.thread import IDLE_SECONDS
from tests.process.conditions import PACE
from tests.process.transfer_ends import ReceiverEnd, Remote, SenderEnd

PREFILL_EPOCH, DECODE_EPOCH = 11, 22
PAGES = 64
TOKENS_PER_PAGE = 16
LAYOUT = {"model": "test", "dtype": "bfloat16", "page_size": TOKENS_PER_PAGE, "kv_heads": 3, "head_dim": 64}
SOURCES, TARGETS = list(range(58)), list(range(2, 60))
OTHERS = [60, 61, 62, 63]
"""Pages of the receiver that are used by somebody else all the time."""
BOUND = 20.0 * PACE
"""Seconds that anything may take; what takes less is asserted where it matters."""


class Pair:
    """Two engine processes, and the relay between them that the control processes would be."""

    def __init__(
        self,
        transfer: str,
        environment: dict[str, str] | None = None,
        write_timeout: float = WRITE_TIMEOUT_SECONDS * PACE,
        layers: int = 6,
    ) -> None:
        """A page has 12 KiB for each of the `layers`."""
        layout = {**LAYOUT, "layers": layers}
        self.sender = Remote.begin(
            SenderEnd, transfer, layout, PAGES, PREFILL_EPOCH, write_timeout, environment=environment
        )
        self.receiver = Remote.begin(ReceiverEnd, transfer, layout, PAGES, DECODE_EPOCH, environment=environment)
        for end in (self.sender, self.receiver):
            end.answer()
        self.events: list[Any] = []
        self.to_sender: list[bytes] = []
        """What is on the wires, encoded."""
        self.to_receiver: list[bytes] = []

    def connect(self) -> None:
        self.sender.call("peer_up", self.receiver.call("hello"))
        self.receiver.call("peer_up", self.sender.call("hello"))

    def step_sender(self) -> None:
        sent, ended = self.sender.call("step", DECODE_EPOCH, self.to_sender)
        self.to_sender = []
        self.to_receiver += sent
        self.events += ended

    def step_receiver(self) -> None:
        sent, events = self.receiver.call("step", PREFILL_EPOCH, self.to_receiver)
        self.to_receiver = []
        # Control processes keep this question to themselves.
        self.to_sender += [frame for frame in sent if not isinstance(decode(frame), DeathAsked)]
        self.events += events

    def until(self, found: Callable[[Any], bool], *steps: Callable[[], None]) -> Any:
        """Steps both sides (or `steps`) until an event fits; takes it and returns it."""
        deadline = time.monotonic() + BOUND
        while time.monotonic() < deadline:
            for index, event in enumerate(self.events):
                if found(event):
                    return self.events.pop(index)
            for step in steps or (self.step_sender, self.step_receiver):
                step()
        raise AssertionError(f"it did not happen; seen: {self.events}")

    def grant(self, fence: Fence, tokens: int, pages: list[int], skip: int = 0) -> None:
        self.sender.call("offer", fence, tokens)
        self.until(lambda event: event == OfferArrived(fence, tokens))
        self.receiver.call("grant", fence, pages, skip)
        self.step_receiver()
        self.step_sender()

    def use_others(self) -> None:
        for page in OTHERS:
            self.receiver.call("fill", page, 9)

    def kill(self) -> None:
        self.sender.kill()
        self.receiver.kill()

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


def fence(request: str) -> Fence:
    return Fence(request, 0, PREFILL_EPOCH, DECODE_EPOCH)


def of(kind: type, handoff: Fence) -> Callable[[Any], bool]:
    return lambda event: type(event).__name__ == kind.__name__ and event.fence == handoff


def ended(handoff: Fence) -> Callable[[Any], bool]:
    return lambda event: type(event).__name__ == "HandoffEnded" and event.fence == handoff


def hand_over(pair: Pair, handoff: Fence, sources: list[int], targets: list[int]) -> None:
    """To a good end."""
    tokens = len(sources) * TOKENS_PER_PAGE
    pair.grant(handoff, tokens, targets)
    pair.sender.call("computed", handoff, sources, tokens)
    pair.sender.call("finish", handoff, 1)
    pair.until(of(KVArrived, handoff))
    assert pair.until(ended(handoff)).error is None
    assert pair.receiver.call("digests", targets) == pair.sender.call("digests", sources)


def pause(end: Remote) -> None:
    os.kill(end.process.pid, signal.SIGSTOP)


def resume(end: Remote) -> None:
    os.kill(end.process.pid, signal.SIGCONT)


def cancelled_but_kept(pair: Pair, handoff: Fence) -> None:
    """The receiver wants its pages back; while the writer says nothing, and is not dead, it does not get them."""
    resume(pair.receiver)
    pair.receiver.call("cancel", handoff)
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        pair.step_receiver()
    assert pair.receiver.call("quarantined") == 1
    assert not pair.events


def reused_pages_stay_untouched(pair: Pair) -> None:
    """For longer than the idle writer's transfer thread looks away from its engine."""
    for page in TARGETS:
        pair.receiver.call("fill", page, 6)
    reused = pair.receiver.call("digests", TARGETS)
    others = pair.receiver.call("digests", OTHERS)
    pair.receiver.call("idle_cpu", 2 * IDLE_SECONDS)
    assert pair.receiver.call("digests", TARGETS) == reused
    pair.use_others()
    assert pair.receiver.call("digests", OTHERS) == others, "nor was what others used all the time"

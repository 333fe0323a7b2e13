"""A sender and a receiver over a real transfer engine, for tests of whole handoffs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cluster.messages import Fence
from kv_transfer.driver import WRITE_TIMEOUT_SECONDS
from kv_transfer.receiver import OfferArrived
from tests.process.conditions import PACE
from tests.process.transfer_ends import ReceiverEnd, Remote, SenderEnd

LAYOUT = {"model": "test", "dtype": "bfloat16", "page_size": 16, "kv_heads": 3, "head_dim": 64}
PREFILL_EPOCH, DECODE_EPOCH = 11, 22
PAGES = 64
BOUND = 20.0 * PACE
"""Seconds that anything may take; what takes less is asserted where it matters."""


class Pair:
    """Two engine processes, and the relay between them that the control processes would be."""

    def __init__(
        self,
        transfer: str,
        environment: dict[str, str] | None = None,
        write_timeout: float = WRITE_TIMEOUT_SECONDS,
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
        self.to_sender += sent
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

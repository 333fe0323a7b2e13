"""The engine process's only loop: read messages, take a step, tell of it; wait only when there is nothing to do."""

from __future__ import annotations

from typing import Protocol

from cluster.clock import Clock
from cluster.engine_messages import EngineLoad, EngineMessage, Stop
from cluster.ipc import ControlGone, EngineChannel
from cluster.messages import Load
from cluster.progress_board import ProgressBoard

IDLE_SECONDS = 0.25
"""How long an idle loop sleeps when nobody wakes it: its load report is at most this old."""
REPORT_SECONDS = 0.25


class StepHandler(Protocol):
    """A role's work. All methods are called by the loop, on its thread."""

    def handle(self, message: EngineMessage, now: float) -> None:
        """One message from the control process."""

    def step(self, now: float) -> bool:
        """One step of work, if there is any; False lets the loop wait for a message or a wake-up."""

    def load(self) -> Load: ...

    def close(self) -> None:
        """Ends transfers and releases the device; called once, at the end."""


class StepLoop:
    """Drives a `StepHandler` until `Stop` or until the control process is gone; marks each turn on the board."""

    def __init__(self, handler: StepHandler, channel: EngineChannel, clock: Clock, board: ProgressBoard) -> None:
        self._handler = handler
        self._channel = channel
        self._clock = clock
        self._board = board
        self._reported: Load | None = None
        self._report_at = 0.0

    def run(self) -> None:
        try:
            while self._turn():
                pass
        except ControlGone:
            pass
        finally:
            self._handler.close()

    def _turn(self) -> bool:
        for message in self._channel.receive():
            if isinstance(message, Stop):
                return False
            self._handler.handle(message, self._clock.now())
        now = self._clock.now()
        self._board.step_begins(now)
        busy = self._handler.step(now)
        self._board.step_ends()
        self._board.advance()
        self._report(idle=not busy)
        if busy:
            self._channel.flush()
        else:
            self._channel.wait(IDLE_SECONDS)
        return True

    def _report(self, *, idle: bool) -> None:
        """Tells the load when it is due, and at once when work has ended: an idle worker's last word must be true."""
        now = self._clock.now()
        if now < self._report_at and not idle:
            return
        load = self._handler.load()
        if load != self._reported:
            self._channel.send(EngineLoad(load))
            self._reported = load
        self._report_at = now + REPORT_SECONDS

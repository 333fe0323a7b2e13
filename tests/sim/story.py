"""What happened in one simulation, for people: messages, faults and state changes in the order of time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import msgspec

from cluster.clock import Clock
from cluster.messages import Heartbeat, Message
from cluster.state_machine import StateMachine

if TYPE_CHECKING:
    from tests.sim.network import SimLink

LONGEST_LINE = 220


class Story:
    """Collects lines while it is `told`; else it costs nothing. `clock` is the simulation's."""

    def __init__(self, *, told: bool = False) -> None:
        self.clock: Clock
        self.lines: list[str] = []
        self._told = told

    def note(self, text: str) -> None:
        if self._told:
            self.lines.append(f"{self.clock.now() - 1000.0:8.4f}  {text}"[:LONGEST_LINE])

    def trace(self, text: str) -> None:
        """Where in the code it ended."""
        if self._told:
            self.lines += text.splitlines()

    def message(self, link: SimLink, message: Message) -> None:
        if self._told and not isinstance(message, Heartbeat):
            self.note(f"    {link.other.host} -> {link.host}: {_brief(message)}")

    @contextmanager
    def following_machines(self) -> Iterator[None]:
        """Inside, every transition of every state machine is noted."""
        if not self._told:
            yield
            return
        handle = StateMachine.handle

        def telling(machine: StateMachine[Any], event: Any, now: float) -> list[Any]:
            before = machine.state
            actions = handle(machine, event, now)
            kind = type(machine).__name__
            if kind not in ("MemberMachine", "WorkerHealth"):
                after = f" -> {machine.state.name}" if machine.state is not before else ""
                self.note(f"  {kind} {machine.name}: {before.name} {type(event).__name__}{after}")
            return actions

        with mock.patch.object(StateMachine, "handle", telling):
            yield


def _brief(message: Message) -> str:
    """A message in one line."""
    fields = ", ".join(
        f"{name}={_value(getattr(message, name))}" for name in message.__struct_fields__ if name not in _TEDIOUS
    )
    return f"{type(message).__name__}({fields})"


_TEDIOUS = ("sampling", "layout", "model", "descriptor", "engine", "timings", "digests", "version")


def _value(value: Any) -> str:
    if isinstance(value, msgspec.Struct) and hasattr(value, "request"):
        return str(value)
    if isinstance(value, list) and value and hasattr(value[0], "offset"):
        return " ".join(f"{one.fence}[{one.offset}]={one.token}" for one in value)
    return str(getattr(value, "value", value))[:80]

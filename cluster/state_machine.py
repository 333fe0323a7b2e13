"""The frame of every `*_state.py`: a table of transitions, an error that tells the story, nothing else.

A machine subclasses `StateMachine` (one level, no further) and gives a `TABLE` that maps (state, event type) to a
handler name. A handler gets (event, now), moves with `self.to(state)` and returns the actions that the shell has to
carry out. Handlers do no I/O, read no clock and keep no reference to a shell.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar, Generic, TypeVar

from cluster.errors import IllegalTransition

ActionT = TypeVar("ActionT")

STORY_LENGTH = 16
"""How many events a machine remembers for the story of an `IllegalTransition`."""


class StateMachine(Generic[ActionT]):
    """A table-driven machine: `handle(event, now)` returns the actions to carry out."""

    TABLE: ClassVar[Mapping[tuple[Enum, type], str]] = {}

    def __init__(self, name: str, initial: Enum) -> None:
        self.name = name
        self.state: Enum = initial
        self._story: deque[str] = deque(maxlen=STORY_LENGTH)

    def handle(self, event: Any, now: float) -> list[ActionT]:
        """Takes one event; `now` is in seconds. Raises `IllegalTransition` if the table has no such entry."""
        handler = self.TABLE.get((self.state, type(event)))
        if handler is None:
            raise IllegalTransition(
                f"{self.name}: no transition for {type(event).__name__} in {self.state.name}; story: {self.story()}"
            )
        before = self.state
        actions: list[ActionT] = getattr(self, handler)(event, now)
        self._story.append(f"{now:.3f} {before.name} --{type(event).__name__}--> {self.state.name}")
        return actions

    def accepts(self, event_type: type) -> bool:
        """Whether the current state has a transition for this type of event."""
        return (self.state, event_type) in self.TABLE

    def to(self, state: Enum) -> None:
        self.state = state

    def story(self) -> str:
        """The last events, oldest first."""
        return "; ".join(self._story) or "(no events yet)"

    @classmethod
    def diagram(cls) -> list[tuple[str, str]]:
        """(state, event) pairs of the table, for the documentation and for exhaustive tests."""
        return sorted((state.name, event.__name__) for state, event in cls.TABLE)

"""Which requests the router takes on. Pure: the shell tells who comes, begins and leaves, and when.

A request waits from its arrival until a worker begins to compute its prompt; that is the queue, wherever it stands. It
is bounded three ways: by choices in flight, by prompt tokens that wait, and by time: nobody is let in who would not be
begun in time, for the cluster or for its own deadline, at the rate at which the queue has moved of late.

Who does not fit is refused, unless others of lower priority wait that have not begun: then these make way, the lowest
and among equals the youngest first, and as few as will do. What has begun is never given up. Who would be alone is
always let in, however large: no wait would make more room for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from cluster.config import RouterLimits, SchedulingPolicy
from cluster.errors import Overloaded

HALF_LIFE_SECONDS = 10.0
"""What a rate remembers: half of it is of the last so many seconds."""
LEAST_BUSY_SECONDS = 0.25
"""A rate that has seen less than this says nothing."""
LONGEST_RETRY_SECONDS = 60


@dataclass(eq=False)
class Ticket:
    """One request. `waiting` are its prompt tokens whose computing has not begun, counted once for each choice."""

    choices: int
    waiting: int
    priority: int
    deadline: float
    """On the router's clock, as `arrived`."""
    arrived: float = 0.0
    begun: bool = False


class Rate:
    """How fast something goes while there is some of it: amounts over busy time, both fading."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._busy_seconds = 0.0
        self._now = 0.0

    def advance(self, now: float, *, busy: bool) -> None:
        """`busy`: there was something to do since the last call."""
        passed = max(0.0, now - self._now)
        faded = 0.5 ** (passed / HALF_LIFE_SECONDS)
        self._amount *= faded
        self._busy_seconds *= faded
        if busy:  # what has passed has faded, too: the integral of the fading over it
            self._busy_seconds += (1 - faded) * HALF_LIFE_SECONDS / math.log(2)
        self._now = now

    def add(self, amount: float) -> None:
        self._amount += amount

    def seconds_for(self, amount: float) -> float | None:
        """None: too little was seen to tell, or nothing was ever seen to move."""
        if self._busy_seconds < LEAST_BUSY_SECONDS or not self._amount:
            return None
        return amount * self._busy_seconds / self._amount


class _Room(NamedTuple):
    """What is taken by others, once those that would make way are gone."""

    choices: int
    tokens: int
    ahead: int
    """Waiting tokens that would be computed before."""


GoesBefore = Callable[[Ticket, Ticket], bool]
_GOES_BEFORE: Mapping[SchedulingPolicy, GoesBefore] = MappingProxyType(
    {
        SchedulingPolicy.PRIORITY: lambda waiting, new: waiting.priority >= new.priority,
        SchedulingPolicy.SHORTEST_FIRST: lambda waiting, new: waiting.waiting <= new.waiting,
        SchedulingPolicy.LONGEST_FIRST: lambda waiting, new: waiting.waiting >= new.waiting,
    }
)
"""Which of those that wait are computed before one who comes now; by other policies, all."""


class AdmissionQueue:
    """The requests of one router between arrival and end. `policy` is the prefilling workers' own."""

    def __init__(self, limits: RouterLimits, policy: SchedulingPolicy) -> None:
        self._limits = limits
        self._goes_before = _GOES_BEFORE.get(policy)
        self._inside: set[Ticket] = set()
        self._by_priority: dict[int, dict[Ticket, None]] = {}
        """Those that have not begun, in the order of their coming."""
        self.choices = 0
        """In flight."""
        self.tokens = 0
        """That wait."""
        self._begun_tokens = Rate()
        self._ended_choices = Rate()

    def enter(self, ticket: Ticket, now: float) -> list[Ticket]:
        """Lets `ticket` in. Returns those that have made way for it: they are out. Raises `Overloaded`."""
        self._advance(now)
        displaced = self._make_room(ticket, now)
        for victim in displaced:
            self._remove(victim)
        self._inside.add(ticket)
        self._by_priority.setdefault(ticket.priority, {})[ticket] = None
        self.choices += ticket.choices
        self.tokens += ticket.waiting
        return displaced

    def resize(self, ticket: Ticket, waiting: int, now: float) -> list[Ticket]:
        """Its prompt turned out to have so many tokens. As `enter`; one that is refused is out."""
        if ticket not in self._inside:
            return []
        self._remove(ticket)
        ticket.waiting = waiting
        return self.enter(ticket, now)

    def begin(self, ticket: Ticket, tokens: int, now: float) -> None:
        """The computing of so many of its prompt tokens begins. It makes way for nobody from now on."""
        if ticket not in self._inside:
            return
        self._advance(now)
        tokens = min(tokens, ticket.waiting)
        self._begun_tokens.add(tokens)
        self.tokens -= tokens
        ticket.waiting -= tokens
        ticket.begun = True
        self._unqueue(ticket)

    def leave(self, ticket: Ticket, now: float) -> None:
        """It has ended, however. Harmless for one that has made way."""
        if ticket not in self._inside:
            return
        self._advance(now)
        if ticket.begun:
            self._ended_choices.add(ticket.choices)
        self._remove(ticket)

    def oldest_wait(self, now: float) -> float:
        """Seconds since the first arrival of those that have not begun; 0 if there are none."""
        waiting = (ticket.arrived for tickets in self._by_priority.values() for ticket in tickets)
        return max(0.0, now - min(waiting, default=now))

    def integrity_errors(self) -> list[str]:
        """What does not add up; empty when all is well."""
        choices, tokens = (sum(getattr(ticket, name) for ticket in self._inside) for name in ("choices", "waiting"))
        queued = sum(len(tickets) for tickets in self._by_priority.values())
        found = (self.choices, self.tokens, queued)
        owned = (choices, tokens, sum(not ticket.begun for ticket in self._inside))
        return [] if found == owned else [f"admission: counted {found}, owned {owned} (choices, tokens, queued)"]

    # --- room --------------------------------------------------------------------------------------------------------

    def _make_room(self, ticket: Ticket, now: float) -> list[Ticket]:
        """Who has to make way. Raises `Overloaded` if that would not be enough: then nobody has to."""
        room = _Room(self.choices, self.tokens, self._ahead(ticket))
        refusal = problem = self._problem(ticket, room, now)
        displaced: list[Ticket] = []
        for victim in self._lesser(ticket.priority):
            if problem is None:
                break
            displaced.append(victim)
            ahead = victim.waiting if self._is_before(victim, ticket) else 0
            room = _Room(room.choices - victim.choices, room.tokens - victim.waiting, room.ahead - ahead)
            problem = self._problem(ticket, room, now)
        if problem is not None:
            raise refusal or problem
        return displaced

    def _problem(self, ticket: Ticket, room: _Room, now: float) -> Overloaded | None:
        limits = self._limits
        excess = room.choices + ticket.choices - limits.choices
        if room.choices and excess > 0:
            retry = _retry_after(self._ended_choices.seconds_for(excess))
            message = f"{room.choices} choices are under way; the limit is {limits.choices}"
            return Overloaded(message, retry_after=retry, reason="choices")
        excess = room.tokens + ticket.waiting - limits.queued_tokens
        if room.tokens and excess > 0:
            retry = _retry_after(self._begun_tokens.seconds_for(excess))
            message = f"{room.tokens} prompt tokens wait; the limit is {limits.queued_tokens}"
            return Overloaded(message, retry_after=retry, reason="queued_tokens")
        wait = self._begun_tokens.seconds_for(room.ahead) if room.ahead else None
        patience = min(limits.queue_seconds, ticket.deadline - now)
        if wait is not None and wait > patience:
            may = f"{max(0.0, patience):.0f} s"
            message = f"it would wait about {wait:.0f} s for its first compute; it may wait {may}"
            return Overloaded(message, retry_after=_retry_after(wait - patience), reason="wait")
        return None

    def _lesser(self, priority: int) -> Iterable[Ticket]:
        """Who waits with a lower priority: the lowest first, of equals the youngest."""
        for lower in sorted(self._by_priority):
            if lower >= priority:
                return
            yield from reversed(list(self._by_priority[lower]))

    def _ahead(self, ticket: Ticket) -> int:
        if self._goes_before is None:
            return self.tokens
        return sum(other.waiting for other in self._inside if self._is_before(other, ticket))

    def _is_before(self, other: Ticket, ticket: Ticket) -> bool:
        return self._goes_before is None or self._goes_before(other, ticket)

    # --- books -------------------------------------------------------------------------------------------------------

    def _advance(self, now: float) -> None:
        self._begun_tokens.advance(now, busy=self.tokens > 0)
        self._ended_choices.advance(now, busy=self.choices > 0)

    def _remove(self, ticket: Ticket) -> None:
        self._inside.discard(ticket)
        self.choices -= ticket.choices
        self.tokens -= ticket.waiting
        self._unqueue(ticket)

    def _unqueue(self, ticket: Ticket) -> None:
        queue = self._by_priority.get(ticket.priority, {})
        queue.pop(ticket, None)
        if not queue:
            self._by_priority.pop(ticket.priority, None)


def made_way() -> Overloaded:
    """What a displaced request is told."""
    return Overloaded("a request of higher priority took its place in the queue", reason="displaced")


def _retry_after(seconds: float | None) -> int:
    return 1 if seconds is None else math.ceil(min(max(seconds, 1.0), LONGEST_RETRY_SECONDS))

"""The shell around `AdmissionQueue`: requests come in before anything dear is done for them, and are told when another
takes their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from cluster.clock import Clock
from cluster.errors import InvalidRequest, Overloaded
from cluster.metrics import RouterMetrics
from router.admission import AdmissionQueue, Ticket, made_way
from router.dispatch import ChoiceSpec, Generation

TIMEOUT_HEADER = "X-Request-Timeout"
"""Seconds that the client gives its request; never more than `router.request_timeout_seconds`."""


class Demand(NamedTuple):
    """What a request will take, as far as its body tells."""

    choices: int
    tokens: int
    """Of its prompts, by choice; a guess until they are tokenized."""
    priority: int


class Visit:
    """One request inside. Belongs to its handler."""

    def __init__(self, admission: Admission, ticket: Ticket) -> None:
        self._admission = admission
        self._ticket = ticket
        self._refusal: Overloaded | None = None
        self._generation: Generation | None = None

    def measure(self, specs: Sequence[ChoiceSpec]) -> None:
        """The prompts are tokenized. Raises `Overloaded` if there is no room for so much, or for it any more."""
        if self._refusal is None:
            self._admission.resize(self._ticket, sum(len(spec.prompt) for spec in specs))
        self._require_place()

    def follow(self, generation: Generation, specs: Sequence[ChoiceSpec]) -> None:
        """Its attempts are on their way: the queue hears of their beginning, and they of the queue."""
        self._generation = generation
        generation.on_begun = lambda choice: self._admission.begin(self._ticket, len(specs[choice].prompt))

    def make_way(self, refusal: Overloaded) -> None:
        self._refusal = refusal
        if self._generation is not None:
            self._generation.refuse(refusal)

    def _require_place(self) -> None:
        if self._refusal is not None:
            raise self._refusal


class Admission:
    """All visits of one router. Lives on its event loop."""

    def __init__(self, queue: AdmissionQueue, metrics: RouterMetrics, clock: Clock) -> None:
        self._queue = queue
        self._metrics = metrics
        self._clock = clock
        self._visits: dict[Ticket, Visit] = {}

    @contextmanager
    def enter(self, demand: Demand, deadline: float) -> Iterator[Visit]:
        """For as long as the request lasts; `deadline` is on the router's clock. Raises `Overloaded`."""
        now = self._clock.now()
        ticket = Ticket(demand.choices, demand.tokens, demand.priority, deadline, arrived=now)
        with self._counted():
            self._displace(self._queue.enter(ticket, now))
        visit = self._visits[ticket] = Visit(self, ticket)
        try:
            yield visit
        finally:
            self._visits.pop(ticket, None)
            self._queue.leave(ticket, self._clock.now())

    def resize(self, ticket: Ticket, tokens: int) -> None:
        """Raises `Overloaded`."""
        with self._counted():
            self._displace(self._queue.resize(ticket, tokens, self._clock.now()))

    def begin(self, ticket: Ticket, tokens: int) -> None:
        self._queue.begin(ticket, tokens, self._clock.now())

    def integrity_errors(self) -> list[str]:
        return self._queue.integrity_errors()

    def observe(self) -> None:
        """Brings the gauges up to date."""
        self._metrics.queued_tokens.set(self._queue.tokens)
        self._metrics.choices.set(self._queue.choices)
        self._metrics.oldest_waiting.set(self._queue.oldest_wait(self._clock.now()))

    def _displace(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            refusal = made_way()
            self._metrics.refusals.labels(reason=refusal.reason).inc()
            self._visits[ticket].make_way(refusal)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except Overloaded as refusal:
            self._metrics.refusals.labels(reason=refusal.reason).inc()
            raise


def requested_seconds(headers: Mapping[str, str], most: float) -> float:
    """How long the request may take. Raises `InvalidRequest`."""
    given = headers.get(TIMEOUT_HEADER)
    if given is None:
        return most
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InvalidRequest(f"{TIMEOUT_HEADER}: expected seconds greater than 0, found {given[:40]!r}")
    return min(seconds, most)

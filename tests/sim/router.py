"""The simulated router process and its clients: the real dispatcher, fleet and policies; text and HTTP are left out.

A client knows what it has to get: the reference's tokens, each once and in order, and then one end. When its router
dies it asks again, and leaves out what it has got (`Last-Event-ID`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.config import Topology
from cluster.errors import AvailabilityError, NoWorker
from cluster.messages import DecodeAttempt, FinishReason, Message, PrefillAttempt, Sampling
from router.break_even import BreakEvenPolicy
from router.dispatch import ChoiceSpec, Delivered, Dispatcher, Ended, Failed, Generation
from router.fleet import Fleet
from router.fleet_view import FleetView
from router.policies import LeastLoad, Policy
from router.records import RecordStore
from router.request_state import RequestMachine, WorkerKey
from tests.sim.kernel import Strand, Timer, Violation
from tests.sim.model import reference
from tests.sim.network import Session

if TYPE_CHECKING:
    from tests.sim.cluster import SimCluster

REQUEST_TIMEOUT = 600.0
RETRY_AFTER = 1.0


class SimFleet(Fleet):
    """The real one, which also looks at what goes out: an attempt goes on after what the client has, no token less."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.machines: dict[str, RequestMachine] = {}
        """Of the choices that were placed, by request id."""

    def post(self, key: WorkerKey, message: Message) -> None:
        if isinstance(message, PrefillAttempt | DecodeAttempt):
            machine = self.machines.get(message.fence.request)
            if machine is not None and len(message.output) != machine.delivered:
                raise Violation(
                    f"{message.fence} begins after {len(message.output)} tokens, the client has {machine.delivered}"
                )
        super().post(key, message)


class SimRouter:
    """One life of a router process."""

    def __init__(self, cluster: SimCluster, name: str, metrics: Any, *, unified: bool) -> None:
        self.name = name
        self.strand = Strand(name, "router")
        self.cluster = cluster
        session: Any = Session(cluster.network, self.strand, "router")
        with cluster.loop.running(self.strand):
            view = FleetView(cluster.topology.bootstrap.lease_seconds, unified=unified)
            policy = _policy(cluster.topology)
            self.fleet = SimFleet(session, "http://bootstrap", name, view, policy, cluster.loop, metrics)
            recovery = cluster.topology.router.recovery
            self.dispatcher = Dispatcher(self.fleet, RecordStore(), metrics, cluster.loop, recovery)
            self.fleet.listen(self.dispatcher)
            cluster.loop.spawn(self.strand, self.fleet.run())

    def kill(self) -> None:
        self.strand.alive = False
        self.cluster.network.process_died("router", self.strand)


def _policy(topology: Topology) -> Policy:
    config, pairs = topology.router, LeastLoad()
    if not config.break_even.enabled:
        return pairs
    return BreakEvenPolicy(pairs, config.break_even, topology.prefill.scheduling.policy)


@dataclass
class Choice:
    """One answer, as its client sees it."""

    spec: ChoiceSpec
    expected: list[int]
    stop_after: int | None = None
    tokens: list[int] = field(default_factory=list)
    end: str | None = None

    def take(self, tokens: Sequence[int]) -> None:
        if self.end is not None:
            raise Violation(f"tokens {list(tokens)} came after the end ({self.end})")
        self.tokens += tokens
        if self.tokens != self.expected[: len(self.tokens)]:
            raise Violation(f"the client got {self.tokens}, an undisturbed run gives {self.expected}")

    def finish(self, reason: str) -> None:
        if self.end is not None:
            raise Violation(f"it ended twice: {self.end}, {reason}")
        self.end = reason


class Client:
    """One request. `name` is its X-Request-Id."""

    def __init__(self, cluster: SimCluster, name: str, prompt: list[int], samplings: list[Sampling]) -> None:
        self.cluster = cluster
        self.name = name
        self.gone = False
        self.refusals = 0
        self.connections = 0
        self.choices = [Choice(ChoiceSpec(prompt, one), reference(prompt, one)) for one in samplings]
        self.serving: asyncio.Task[None] | None = None
        self._asking: Timer | None = None

    @property
    def ended(self) -> bool:
        return self.gone or all(choice.end is not None for choice in self.choices)

    def ask_in(self, seconds: float) -> None:
        """Sends the request, or what is left of it; one at a time."""
        if self._asking is not None:
            self._asking.cancel()
        self._asking = self.cluster.loop.at(seconds, None, self._ask)

    def _ask(self) -> None:
        router = self.cluster.router
        if self.ended:
            return
        if not router.strand.alive:
            self.ask_in(RETRY_AFTER)
            return
        self.connections += 1
        self.serving = self.cluster.loop.spawn(router.strand, self._serve(router))

    def leave(self) -> None:
        """The client goes for good."""
        self.gone = True
        self._disconnect()

    def reconnect(self, delay: float) -> None:
        """Its connection breaks, and it asks again for the rest."""
        self._disconnect()
        self.ask_in(delay)

    def _disconnect(self) -> None:
        """The router's handler is cancelled, as aiohttp does it."""
        if self.serving is not None:
            with self.cluster.loop.running(self.cluster.router.strand):
                self.serving.cancel()

    async def _serve(self, router: SimRouter) -> None:
        """What the router's HTTP handler does. A router that still knows what the client has does not compute it again,
        another one leaves it out."""
        known = self.cluster.random.random() < 0.5
        begun = [known and 0 < len(choice.tokens) < len(choice.expected) for choice in self.choices]
        skip = [0 if begins else len(choice.tokens) for choice, begins in zip(self.choices, begun, strict=True)]
        specs = [
            choice.spec._replace(output=tuple(choice.tokens)) if begins else choice.spec
            for choice, begins in zip(self.choices, begun, strict=True)
        ]
        try:
            generation = router.dispatcher.begin(
                f"{self.name}-{self.connections}", self.name, specs, self.cluster.loop.now(), 0.0, REQUEST_TIMEOUT
            )
        except AvailabilityError:
            self._refused()
            return
        router.fleet.machines |= {choice.machine.name: choice.machine for choice in generation.choices}
        try:
            await self._read(generation, skip)
        finally:
            generation.close("the client is gone")

    async def _read(self, generation: Generation, skip: list[int]) -> None:
        open_choices = {index for index, choice in enumerate(self.choices) if choice.end is None}
        while open_choices:
            for event in await generation.events():
                if event.choice not in open_choices:
                    if isinstance(event, Ended) and self.choices[event.choice].end is None:
                        raise Violation("an end came after the end")
                    continue
                choice = self.choices[event.choice]
                if isinstance(event, Delivered):
                    new = [emitted.token for emitted in event.tokens]
                    known = min(skip[event.choice], len(new))
                    skip[event.choice] -= known
                    choice.take(new[known:])
                    if choice.stop_after is not None and len(choice.tokens) >= choice.stop_after:
                        choice.finish("stop")
                        generation.stop(event.choice)
                elif isinstance(event, Ended):
                    self._ended(choice, event)
                elif isinstance(event, Failed):
                    if isinstance(event.error, NoWorker) and not any(choice.tokens for choice in self.choices):
                        self._refused()
                        return
                    raise Violation(f"{self.name} failed: {type(event.error).__name__}: {event.error}")
                if choice.end is not None:
                    open_choices.discard(event.choice)

    def _refused(self) -> None:
        """It was told to come again before it had got anything."""
        self.refusals += 1
        self.ask_in(RETRY_AFTER)

    def _ended(self, choice: Choice, event: Ended) -> None:
        if choice.tokens != choice.expected:
            raise Violation(f"it ended ({event.reason.value}) after {choice.tokens} of {choice.expected}")
        stopped = choice.expected[-1] in choice.spec.sampling.stop_token_ids
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        if event.reason is not reason:
            raise Violation(f"the reason is {event.reason.value}, an undisturbed run has {reason.value}")
        choice.finish(event.reason.value)

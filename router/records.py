"""Where a request's time went: collected while it runs, kept for a while after, served at /v1/requests/{id}.

Times are the router's own, from the request's arrival; timings by leg are the workers' words. Clocks of different hosts
are never compared: a worker tells durations of its own clock, and what the router's has beyond them is the way between.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from cluster.errors import BatonError
from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings

KEPT_REQUESTS = 4096
KEPT_ATTEMPTS = 16
"""Of one choice: the first half of them, and the last ones."""


class Percentiles(msgspec.Struct, frozen=True):
    """By nearest rank; None without any value."""

    p50: float | None
    p99: float | None


class FirstToken(msgspec.Struct, frozen=True):
    """`first_token_seconds` as the sum of `router`, `network`, `queue`, `prefill` and `rest`, in seconds."""

    router: float
    """Arrival until sent to the workers: read, checked, tokenized, placed."""
    tokenize: float
    """Of it, template and tokenization, a wait for their thread included."""
    network: float
    """To the prefilling worker and back: sent until it told of its start, less its queueing."""
    queue: float
    """At the worker, until its first chunk began."""
    prefill: float
    """There, until the token was sampled."""
    rest: float
    """What the token's own way took beyond that of the first word; so it can be a little below zero."""


class AttemptRecord(msgspec.Struct, frozen=True):
    """One attempt at a choice."""

    prefill_worker: str | None
    decode_worker: str | None
    placed_seconds: float
    """Since the request's arrival."""
    ended_seconds: float | None
    tokens: int
    """That the client got from it."""
    end: str | None
    """The choice's finish reason, or what interrupted the attempt; None while it runs."""
    error: str | None
    """What was said, if it failed."""
    blame: str | None
    """The worker whose fault that was."""


class ChoiceRecord(msgspec.Struct, frozen=True):
    """One choice. None: not known, not yet known, or (a leg's timings) no such leg."""

    id: str
    prompt_tokens: int
    output_tokens: int
    queue_seconds: float | None
    """Sent to the workers until the first compute began."""
    prefill: PrefillTimings | None
    handoff: HandoffTimings | None
    decode: DecodeTimings | None
    first_token_seconds: float | None
    """Since the request's arrival, tokenization included."""
    first_token: FirstToken | None
    """The same, by part."""
    second_token_seconds: float | None
    """Since the first: with two legs, the exposed part of the handoff and decode's first step."""
    inter_token_seconds: Percentiles
    total_seconds: float | None
    attempts: int
    """How often it was placed: once, and again for each time that it was interrupted. The workers are the last ones;
    prefill and handoff are of the first attempt that told them, decode of all together."""
    history: list[AttemptRecord]
    """The attempts, oldest first; of very many, the first and the last ones."""
    prefill_worker: str | None
    decode_worker: str | None
    finish_reason: str | None
    error: str | None
    blame: str | None
    """The leg whose fault a failure was."""


class RequestRecord(ChoiceRecord, frozen=True):
    """A request: its first choice, and all of them."""

    choices: list[ChoiceRecord]


@dataclass
class AttemptTrace:
    """Collects one attempt's record."""

    prefill_worker: str | None
    decode_worker: str | None
    placed_at: float
    tokens_before: int
    ended_at: float | None = None
    tokens: int = 0
    end: str | None = None
    error: str | None = None
    blame: str | None = None

    def close(self, now: float, output_tokens: int, end: str) -> None:
        """Its first end counts."""
        if self.ended_at is None:
            self.ended_at, self.tokens, self.end = now, output_tokens - self.tokens_before, end

    def record(self, arrived: float, output_tokens: int) -> AttemptRecord:
        running = self.ended_at is None
        return AttemptRecord(
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            placed_seconds=self.placed_at - arrived,
            ended_seconds=_between(arrived, self.ended_at),
            tokens=output_tokens - self.tokens_before if running else self.tokens,
            end=self.end,
            error=self.error,
            blame=self.blame,
        )


@dataclass
class ChoiceTrace:
    """Collects one choice's record; written by the dispatcher only. Times are of the router's clock."""

    id: str
    prompt_tokens: int
    arrived: float
    tokenize_seconds: float = 0.0
    attempts: int = 0
    history: list[AttemptTrace] = field(default_factory=list)
    placed_at: float | None = None
    started_at: float | None = None
    first_token_at: float | None = None
    second_token_at: float | None = None
    last_token_at: float | None = None
    ended_at: float | None = None
    cached_tokens: int = 0
    """Prompt tokens that the prefilling leg did not have to compute."""
    output_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None
    blame: str | None = None
    prefill: PrefillTimings | None = None
    handoff: HandoffTimings | None = None
    decode: DecodeTimings | None = None
    _gaps: list[float] = field(default_factory=list)
    _percentiles: Percentiles | None = None

    def placed(self, prefill: str | None, decode: str | None, now: float) -> None:
        """The next attempt begins."""
        self.attempts += 1
        self.placed_at = now if self.placed_at is None else self.placed_at
        if len(self.history) == KEPT_ATTEMPTS:
            del self.history[KEPT_ATTEMPTS // 2]
        self.history.append(AttemptTrace(prefill, decode, now, self.output_tokens))

    def interrupted(self, kind: str, error: BatonError | None, blame: str | None, now: float) -> None:
        """The attempt ends before the choice does."""
        attempt = self.history[-1]
        attempt.error = f"{type(error).__name__}: {error.message}" if error else None
        attempt.blame = blame
        attempt.close(now, self.output_tokens, kind)

    def end(self, finish_reason: str, now: float) -> None:
        """The choice ends; its first end counts."""
        if self.ended_at is None:
            self.ended_at, self.finish_reason = now, finish_reason
            if self.history:
                self.history[-1].close(now, self.output_tokens, finish_reason)

    @property
    def prefill_worker(self) -> str | None:
        return self.history[-1].prefill_worker if self.history else None

    @property
    def decode_worker(self) -> str | None:
        return self.history[-1].decode_worker if self.history else None

    def tokens(self, count: int, now: float) -> list[float]:
        """`count` tokens went to the client. Returns the times since the token before, one for each but the first."""
        last, self.last_token_at = self.last_token_at, now
        self.output_tokens += count
        if last is None:
            self.first_token_at = now
            gaps = [0.0] * (count - 1)
            self.second_token_at = now if gaps else None
        else:
            gaps = [now - last] + [0.0] * (count - 1)
            self.second_token_at = now if self.second_token_at is None else self.second_token_at
        self._gaps += gaps
        return gaps

    def seal(self) -> None:
        """All is known: what was kept to compute from is given up."""
        self._percentiles = self._inter_token()
        self._gaps = []

    def record(self) -> ChoiceRecord:
        return ChoiceRecord(
            id=self.id,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            queue_seconds=_between(self.placed_at, self.started_at),
            prefill=self.prefill,
            handoff=self.handoff,
            decode=self.decode,
            first_token_seconds=_between(self.arrived, self.first_token_at),
            first_token=self._first_token(),
            second_token_seconds=_between(self.first_token_at, self.second_token_at),
            inter_token_seconds=self._percentiles or self._inter_token(),
            total_seconds=_between(self.arrived, self.ended_at),
            attempts=self.attempts,
            history=[attempt.record(self.arrived, self.output_tokens) for attempt in self.history],
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            finish_reason=self.finish_reason,
            error=self.error,
            blame=self.blame,
        )

    def _first_token(self) -> FirstToken | None:
        prefill = self.prefill
        if self.placed_at is None or self.started_at is None or self.first_token_at is None or prefill is None:
            return None
        network = self.started_at - self.placed_at - prefill.queue_seconds
        return FirstToken(
            router=self.placed_at - self.arrived,
            tokenize=self.tokenize_seconds,
            network=network,
            queue=prefill.queue_seconds,
            prefill=prefill.compute_seconds,
            rest=self.first_token_at - self.placed_at - network - prefill.queue_seconds - prefill.compute_seconds,
        )

    def _inter_token(self) -> Percentiles:
        gaps = sorted(self._gaps)
        return Percentiles(_nearest_rank(gaps, 50), _nearest_rank(gaps, 99))


class RecordStore:
    """The traces of the last `capacity` requests, by the response's id and by the client's own request id."""

    def __init__(self, capacity: int = KEPT_REQUESTS) -> None:
        self._capacity = capacity
        self._requests: OrderedDict[str, _Kept] = OrderedDict()
        self._aliases: dict[str, str] = {}

    def add(self, request: str, alias: str, traces: list[ChoiceTrace]) -> None:
        """`alias` is the X-Request-Id; used again, it means the latest request."""
        self._requests[request] = _Kept(alias, traces)
        self._aliases[alias] = request
        if len(self._requests) > self._capacity:
            oldest, kept = self._requests.popitem(last=False)
            if self._aliases.get(kept.alias) == oldest:
                del self._aliases[kept.alias]

    def get(self, request: str) -> RequestRecord | None:
        name = request if request in self._requests else self._aliases.get(request, "")
        kept = self._requests.get(name)
        if kept is None:
            return None
        choices = [trace.record() for trace in kept.traces]
        return RequestRecord(**(msgspec.structs.asdict(choices[0]) | {"id": name}), choices=choices)


class _Kept(NamedTuple):
    alias: str
    traces: list[ChoiceTrace]


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


def _nearest_rank(values: list[float], percent: int) -> float | None:
    """The smallest of the sorted `values` that at least `percent` percent of them do not exceed."""
    return values[-(-percent * len(values) // 100) - 1] if values else None

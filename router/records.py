"""Where a request's time went: collected while it runs, kept for a while after, served at /v1/requests/{id}.

Times are the router's own, from the request's arrival; timings by leg are the workers' words.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from cluster.messages import DecodeTimings, HandoffTimings, PrefillTimings

KEPT_REQUESTS = 4096


class Percentiles(msgspec.Struct, frozen=True):
    """By nearest rank; None without any value."""

    p50: float | None
    p99: float | None


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
    inter_token_seconds: Percentiles
    total_seconds: float | None
    attempts: int
    """How often it was placed: once, and again for each time that it was interrupted. The workers are the last ones;
    prefill and handoff are of the first attempt, decode of all together."""
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
class ChoiceTrace:
    """Collects one choice's record; written by the dispatcher only. Times are of the router's clock."""

    id: str
    prompt_tokens: int
    arrived: float
    attempts: int = 0
    prefill_worker: str | None = None
    decode_worker: str | None = None
    placed_at: float | None = None
    started_at: float | None = None
    first_token_at: float | None = None
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

    def tokens(self, count: int, now: float) -> list[float]:
        """`count` tokens went to the client. Returns the times since the token before, one for each but the first."""
        last, self.last_token_at = self.last_token_at, now
        self.output_tokens += count
        if last is None:
            self.first_token_at = now
            gaps = [0.0] * (count - 1)
        else:
            gaps = [now - last] + [0.0] * (count - 1)
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
            inter_token_seconds=self._percentiles or self._inter_token(),
            total_seconds=_between(self.arrived, self.ended_at),
            attempts=self.attempts,
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            finish_reason=self.finish_reason,
            error=self.error,
            blame=self.blame,
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

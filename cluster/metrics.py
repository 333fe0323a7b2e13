"""Every metric of Baton: names, labels, buckets. One registry per process, served at its `/metrics`.

Base units, Prometheus suffixes. The values of labels are few by construction: a worker's name, a role, an error class,
a route. Where they are known before, their series begin at 0: an increase from nothing is none for Prometheus. What is
told of single workers by others (router, bootstrap) ends when the worker is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import product
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from cluster.health_state import Cause, Part
from cluster.messages import FinishReason, Load, MemberStatus, Role
from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_PLACEMENT = (0.00002, 0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BYTES = tuple(float(2**n) for n in range(16, 35, 2))
_EXPECTED_FAILURES = (
    "WorkerLost",
    "WorkerStalled",
    "WorkerSilent",
    "TransferFailed",
    "PeerUnreachable",
    "TransferStuck",
    "QuarantineFull",
)
"""Of an attempt, by class: what an alert must not miss the first time."""
_UNAUTHORIZED = "baton_unauthorized_requests_total"
_UNAUTHORIZED_TEXT = "Requests refused for want of proof of the secret; no_proof: each exchange begins with one."


def render(registry: CollectorRegistry) -> bytes:
    """The text exposition of `registry`."""
    return generate_latest(registry)


def _registry() -> CollectorRegistry:
    """Knows the process itself: CPU, memory, open files, when it began (Linux)."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def _begin(family: Counter, **values: Collection[str]) -> None:
    """Lets the series of each combination of these labels begin at 0."""
    names = list(values)
    for combination in product(*values.values()):
        family.labels(**dict(zip(names, combination, strict=True)))


class _Families:
    """Makes the metrics of one process, each of which has the labels `common` before its own."""

    def __init__(self, *common: str) -> None:
        self.registry = _registry()
        self._common = common

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, [*self._common, *labels], registry=self.registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, [*self._common, *labels], registry=self.registry)

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, self._common, buckets=buckets, registry=self.registry)


class BootstrapMetrics:
    """What bootstrap counts. Written from its event loop only."""

    def __init__(self) -> None:
        make = _Families()
        self.registry = make.registry
        self._members = make.gauge("baton_members", "Live members.", "role")
        age = "Time since a live member's last heartbeat."
        self._ages = make.gauge("baton_member_heartbeat_age_seconds", age, "worker", "role")
        self._watchers = make.gauge("baton_watchers", "Processes that follow the roster.")
        self._joins = make.counter("baton_member_joins_total", "Worker instances that registered.")
        left = "Worker instances that are members no more: goodbye, or silence until the lease was over."
        self._leaves = make.counter("baton_member_leaves_total", left, "reason")
        _begin(self._leaves, reason=("goodbye", "silence"))
        self._unauthorized = make.counter(_UNAUTHORIZED, _UNAUTHORIZED_TEXT, "reason")

    def observe(self, members: Collection[MemberStatus], watchers: int) -> None:
        """Brings the gauges up to date. Who is no member has none."""
        roles = [status.member.role for status in members]
        for role in Role:
            self._members.labels(role=role.value).set(roles.count(role))
        self._ages.clear()
        for status in members:
            self._ages.labels(worker=status.member.worker, role=status.member.role.value).set(status.age_seconds)
        self._watchers.set(watchers)

    def joined(self) -> None:
        self._joins.inc()

    def unauthorized(self, reason: str) -> None:
        self._unauthorized.labels(reason=reason).inc()

    def left(self, *, silent: bool) -> None:
        """`silent`: without a goodbye, its lease is over."""
        self._leaves.labels(reason="silence" if silent else "goodbye").inc()


class SeenWorker(NamedTuple):
    """What a router says of one life of a worker."""

    worker: str
    role: Role
    attempts: int
    """Of this router, under way there."""
    heartbeat_age_seconds: float | None
    """None while there is no link."""
    shut_out: bool
    """Its breaker is open."""


class RouterMetrics:
    """What the router counts. Written from its event loop only."""

    def __init__(self) -> None:
        make = _Families()
        self.registry = make.registry
        self._make_request_metrics(make)
        self._make_attempt_metrics(make)
        self._make_fleet_metrics(make)

    def _make_request_metrics(self, make: _Families) -> None:
        self.requests = make.counter("baton_requests_total", "Requests by route and their one end.", "route", "outcome")
        outcomes = ("finished", "cancelled", "rejected", "failed")
        _begin(self.requests, route=("completions", "chat"), outcome=outcomes)
        self.errors = make.counter("baton_request_errors_total", "Errors by class.", "error")
        self.in_flight = make.gauge("baton_requests_in_flight", "Requests between arrival and end.")
        self.prompt_tokens = make.histogram("baton_request_prompt_tokens", "Prompt length of a request.", _TOKENS)
        self.output_tokens = make.histogram("baton_request_output_tokens", "Output length of a request.", _TOKENS)
        self.first_token = make.histogram("baton_time_to_first_token_seconds", "Arrival to first token.", _LATENCY)
        between = "Between two tokens of a request."
        self.inter_token = make.histogram("baton_inter_token_latency_seconds", between, _STEP)
        self.duration = make.histogram("baton_request_duration_seconds", "Arrival to end.", _LATENCY)
        self.tokenize = make.histogram("baton_tokenize_seconds", "Template and tokenization of a request.", _STEP)
        self.refusals = make.counter("baton_admission_refusals_total", "Requests answered 429, by the bound.", "reason")
        _begin(self.refusals, reason=("choices", "queued_tokens", "wait", "displaced"))
        self.oldest_waiting = make.gauge(
            "baton_oldest_waiting_request_seconds",
            "How long the oldest request has waited whose first compute has not begun; 0: none waits.",
        )
        waiting = "Prompt tokens of this router's requests that wait."
        self.queued_tokens = make.gauge("baton_queued_prompt_tokens", waiting)
        self.choices = make.gauge("baton_choices_in_flight", "Choices between admission and end.")

    def _make_attempt_metrics(self, make: _Families) -> None:
        self.resumptions = make.counter(
            "baton_request_resumptions_total",
            "Requests that went on as another attempt, by what ended the one before.",
            "reason",
        )
        self.failures = make.counter(
            "baton_attempt_failures_total",
            "Attempts that failed, by error class and by the leg that is to blame (none: nobody in particular).",
            "error",
            "role",
        )
        _begin(self.failures, error=_EXPECTED_FAILURES, role=[role.value for role in Role])
        self.placements = make.counter(
            "baton_placements_total",
            "Attempts that were given workers: a pair, a decode worker alone, or a prefill worker alone.",
            "legs",
        )
        _begin(self.placements, legs=("pair", "decode", "prefill"))
        self.placement = make.histogram("baton_placement_seconds", "Choosing an attempt's workers.", _PLACEMENT)
        self.stale = make.counter("baton_stale_messages_total", "Messages refused for their fence.", "kind")

    def _make_fleet_metrics(self, make: _Families) -> None:
        self.workers = make.gauge("baton_workers", "Live workers in the router's view.", "role")
        self.breaker_trips = make.counter(
            "baton_breaker_trips_total",
            "Times that a worker was shut out for a while, after failures of requests that it had.",
            "worker",
            "role",
        )
        self._tripped: set[tuple[str, str]] = set()
        self._by_worker = {
            name: make.gauge(name, text, "worker", "role")
            for name, text in (
                ("baton_worker_attempts", "Attempts of this router that are under way at a worker."),
                ("baton_worker_heartbeat_age_seconds", "Time since a linked worker's last heartbeat."),
                ("baton_worker_shut_out", "1 while a worker's breaker is open: it gets work if there is no other."),
            )
        }

    def observe_workers(self, workers: Iterable[SeenWorker]) -> None:
        """Brings the gauges of single workers up to date. Who is not among them has no series any more."""
        attempts, ages, shut_out = self._by_worker.values()
        for gauge in self._by_worker.values():
            gauge.clear()
        present = set()
        for seen in workers:
            labels = {"worker": seen.worker, "role": seen.role.value}
            present.add((seen.worker, seen.role.value))
            attempts.labels(**labels).inc(seen.attempts)  # a former life may be ending what it has
            shut_out.labels(**labels).set(seen.shut_out)
            if seen.heartbeat_age_seconds is not None:
                ages.labels(**labels).set(seen.heartbeat_age_seconds)
        for worker, role in self._tripped - present:
            self.breaker_trips.remove(worker, role)
        self._tripped &= present

    def breaker_tripped(self, worker: str, role: Role) -> None:
        self._tripped.add((worker, role.value))
        self.breaker_trips.labels(worker=worker, role=role.value).inc()


class WorkerMetrics:
    """What a worker counts. Written from its control process's event loop only."""

    def __init__(self, worker: str, role: Role) -> None:
        self._labels = {"worker": worker, "role": role.value}
        make = _Families(*self._labels)
        self.registry = make.registry
        self._make_work_metrics(make)
        self._make_memory_metrics(make)
        self._make_health_metrics(make)

    def _make_work_metrics(self, make: _Families) -> None:
        self._attempts = make.counter("baton_attempts_total", "Attempts by their end.", "outcome")
        self._tokens = make.counter("baton_output_tokens_total", "Tokens sampled.")
        self._prefilled = make.counter("baton_prefill_tokens_total", "Prompt tokens computed.")
        self._steps = make.gauge("baton_engine_steps", "Engine steps since its start.")
        self._queue_wait = make.histogram("baton_queue_wait_seconds", "Attempt received to first compute.", _LATENCY)
        self._prefill = make.histogram("baton_prefill_seconds", "First chunk to last chunk computed.", _LATENCY)
        self._handoff = make.histogram("baton_handoff_seconds", "Time with writes under way.", _LATENCY)
        self._exposed = make.histogram("baton_handoff_exposed_seconds", "Last chunk computed to ACK.", _LATENCY)
        self._grant_wait = make.histogram("baton_grant_wait_seconds", "OFFER to GRANT.", _LATENCY)
        self._handoff_size = make.histogram("baton_handoff_size_bytes", "KV bytes of one handoff.", _BYTES)
        self._handoff_bytes = make.counter("baton_handoff_bytes_total", "KV bytes written to peers.")
        self._batch = make.histogram("baton_decode_batch_size", "Mean batch size of a request's steps.", _BATCH)
        self._step = make.histogram("baton_decode_step_seconds", "Mean time of a request's steps.", _STEP)
        self._running = make.gauge("baton_running_requests", "Attempts in the step loop.")
        self._waiting = make.gauge("baton_waiting_requests", "Attempts that wait for compute or KV.")
        self._waiting_tokens = make.gauge(
            "baton_waiting_tokens", "Prompt tokens that wait for compute, those in the prefix cache left out."
        )
        self._begin(self._attempts, outcome=[*(reason.value for reason in FinishReason), "failed", "given_back"])
        for family in (self._tokens, self._prefilled, self._handoff_bytes):
            self._begin(family)

    def _make_memory_metrics(self, make: _Families) -> None:
        self._pages_used = make.gauge("baton_kv_pages_used", "KV pages that have an owner.", "owner")
        self._pages = make.gauge("baton_kv_pages", "KV pages of the pool.")
        self._cached = make.gauge(
            "baton_kv_pages_cached", "KV pages that only the prefix cache has: whoever needs pages gets them."
        )
        self._committed = make.gauge(
            "baton_kv_committed_ratio",
            "Share of the pool that requests hold or that is kept for them; what only the prefix cache has is free.",
        )
        self._quarantined = make.gauge("baton_kv_pages_quarantined", "Granted pages waiting for their writer's word.")

    def _make_health_metrics(self, make: _Families) -> None:
        self._transfers = make.gauge("baton_transfers_in_flight", "Handoffs between OFFER and end.")
        self._stale = make.counter("baton_worker_stale_messages_total", "Messages refused for their fence.")
        self._stale_told = 0
        """By the engine process, since its start."""
        self._peers = make.gauge("baton_peers", "Connected peers of the other pool.")
        self._ready = make.gauge("baton_ready", "1 while the worker takes new work.")
        self._engine_restarts = make.counter(
            "baton_engine_restarts_total",
            "Engine processes started after one died, or was killed for a stall.",
            "cause",
        )
        self._stalls = make.counter("baton_stalls_total", "Times that a part stopped making progress.", "part")
        self._oldest_transfer = make.gauge("baton_oldest_transfer_seconds", "Age of the oldest unfinished transfer.")
        self._unauthorized = make.counter(_UNAUTHORIZED, _UNAUTHORIZED_TEXT, "reason")
        self._refused = make.counter(
            "baton_refused_links_total",
            "Links that were refused, or ended for a frame that broke the contract.",
            "link",
        )
        self._begin(self._stale)
        self._begin(self._engine_restarts, cause=[cause.value for cause in Cause])
        self._begin(self._stalls, part=[part.value for part in Part])
        self._begin(self._refused, link=("router", "peer"))

    def _begin(self, family: Counter, **values: Collection[str]) -> None:
        own = {name: [value] for name, value in self._labels.items()}
        _begin(family, **own, **values)

    def observe_load(self, load: Load) -> None:
        self._steps.labels(**self._labels).set(load.steps)
        self._running.labels(**self._labels).set(load.running)
        self._waiting.labels(**self._labels).set(load.queued)
        self._waiting_tokens.labels(**self._labels).set(load.queued_tokens)
        self._pages.labels(**self._labels).set(load.pages_total)
        self._committed.labels(**self._labels).set(load.pages_used / max(1, load.pages_total))
        self._quarantined.labels(**self._labels).set(load.pages_quarantined)
        self._cached.labels(**self._labels).set(load.pages_cached)
        self._transfers.labels(**self._labels).set(load.transfers)
        fresh = load.stale_messages < self._stale_told  # another engine process, which counts from 0
        self._stale.labels(**self._labels).inc(load.stale_messages - (0 if fresh else self._stale_told))
        self._stale_told = load.stale_messages
        for owner, pages in load.owners.items():
            self._pages_used.labels(**self._labels, owner=owner).set(pages)

    def engine_gone(self) -> None:
        """There is no engine process: what was told of its work is over."""
        self.observe_ready(ready=False)
        self.observe_oldest_transfer(0.0)
        self._pages_used.clear()
        self.observe_load(Load())

    def observe_tokens(self, count: int) -> None:
        self._tokens.labels(**self._labels).inc(count)

    def observe_prefill(self, timings: PrefillTimings) -> None:
        self._queue_wait.labels(**self._labels).observe(timings.queue_seconds)
        self._prefill.labels(**self._labels).observe(timings.compute_seconds)
        self._prefilled.labels(**self._labels).inc(timings.tokens - timings.cached_tokens)

    def observe_handoff(self, timings: HandoffTimings) -> None:
        self._handoff.labels(**self._labels).observe(timings.write_seconds)
        self._exposed.labels(**self._labels).observe(timings.exposed_seconds)
        self._grant_wait.labels(**self._labels).observe(timings.grant_wait_seconds)
        self._handoff_size.labels(**self._labels).observe(timings.bytes)
        self._handoff_bytes.labels(**self._labels).inc(timings.bytes)

    def observe_decode(self, timings: DecodeTimings) -> None:
        if timings.steps:
            self._batch.labels(**self._labels).observe(timings.batch_sum / timings.steps)
            self._step.labels(**self._labels).observe(timings.decode_seconds / timings.steps)

    def attempt_ended(self, outcome: str) -> None:
        self._attempts.labels(**self._labels, outcome=outcome).inc()

    def peers(self, count: int) -> None:
        self._peers.labels(**self._labels).set(count)

    def observe_ready(self, *, ready: bool) -> None:
        self._ready.labels(**self._labels).set(ready)

    def engine_restarted(self, cause: str) -> None:
        self._engine_restarts.labels(**self._labels, cause=cause).inc()

    def stalled(self, part: str) -> None:
        self._stalls.labels(**self._labels, part=part).inc()

    def observe_oldest_transfer(self, seconds: float) -> None:
        self._oldest_transfer.labels(**self._labels).set(seconds)

    def unauthorized(self, reason: str) -> None:
        self._unauthorized.labels(**self._labels, reason=reason).inc()

    def refused(self, link: str) -> None:
        """`link`: router or peer."""
        self._refused.labels(**self._labels, link=link).inc()

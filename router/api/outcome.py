"""How requests end, in numbers and in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.clock import Clock
from cluster.errors import BatonError
from cluster.logging import get_logger
from cluster.metrics import RouterMetrics
from router.api.responses import Usage

log = get_logger(__name__)


class Outcome:
    """Counts one request, by how it left the `with` block."""

    def __init__(self, route: str, request_id: str, metrics: RouterMetrics, clock: Clock) -> None:
        self._route = route
        self._request_id = request_id
        self._metrics = metrics
        self._clock = clock
        self._start = clock.now()
        self._outcome = "finished"
        self._usage: Usage | None = None

    def __enter__(self) -> Outcome:
        self._metrics.in_flight.inc()
        return self

    # Cancelled by the server at a disconnect; or a write found the connection closed.
    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, asyncio.CancelledError | ConnectionError):
            self._outcome = "cancelled"
        elif error is not None:
            refused = isinstance(error, BatonError) and error.status < 500
            self._outcome = "rejected" if refused else "failed"
        seconds = self._clock.now() - self._start
        self._metrics.in_flight.dec()
        self._metrics.requests.labels(route=self._route, outcome=self._outcome).inc()
        self._metrics.duration.observe(seconds)
        log.info(
            "request ended",
            request=self._request_id,
            route=self._route,
            outcome=self._outcome,
            seconds=round(seconds, 4),
            prompt_tokens=self._usage.prompt_tokens if self._usage else None,
            output_tokens=self._usage.completion_tokens if self._usage else None,
        )

    def failed(self, error: BatonError) -> None:
        """An error that was told within a stream, where no exception leaves the handler."""
        self._outcome = "failed"
        self._metrics.errors.labels(error=type(error).__name__).inc()

    def observe(self, usage: Usage, first_tokens: Sequence[float | None], arrived: float) -> None:
        """What the request took and gave, whatever its end."""
        self._usage = usage
        self._metrics.prompt_tokens.observe(usage.prompt_tokens)
        self._metrics.output_tokens.observe(usage.completion_tokens)
        for at in first_tokens:
            if at is not None:
                self._metrics.first_token.observe(at - arrived)

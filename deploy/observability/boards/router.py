"""Admission, placement, breakers."""

from __future__ import annotations

from deploy.observability.boards.queries import HERE, NAMESPACE, RATE, percentiles, rate, total
from deploy.observability.grafana import Dashboard, Graph, Query, Row, Unit

ROUTER = Dashboard(
    "baton-router",
    "Baton / router",
    "Who is let in, who gets which workers, and whom the routers avoid.",
    [NAMESPACE],
    [
        Row(
            "Admission",
            [
                Graph(
                    "Choices in flight",
                    "Prompts x n between admission and end, by router.",
                    Unit.COUNT,
                    [total("baton_choices_in_flight", "instance")],
                ),
                Graph(
                    "Waiting prompt tokens",
                    "Of a router's requests, not begun.",
                    Unit.COUNT,
                    [total("baton_queued_prompt_tokens", "instance")],
                ),
                Graph(
                    "Refused",
                    "429s, by the bound that was reached.",
                    Unit.PER_SECOND,
                    [rate("baton_admission_refusals_total", "reason")],
                    stacked=True,
                ),
                Graph(
                    "Oldest waiting request",
                    "By router.",
                    Unit.SECONDS,
                    [total("baton_oldest_waiting_request_seconds", "instance")],
                ),
            ],
        ),
        Row(
            "Placement",
            [
                Graph(
                    "Placements",
                    "By legs: a pair, or one worker alone.",
                    Unit.PER_SECOND,
                    [rate("baton_placements_total", "legs")],
                    stacked=True,
                ),
                Graph(
                    "Attempts under way",
                    "By worker, over all routers: is the load even?",
                    Unit.COUNT,
                    [total("baton_worker_attempts", "worker")],
                ),
                Graph("Time to choose", "Of one placement.", Unit.SECONDS, percentiles("baton_placement_seconds")),
                Graph(
                    "Tokenizing",
                    "Template and tokenization of a request, the wait for their thread included.",
                    Unit.SECONDS,
                    percentiles("baton_tokenize_seconds"),
                ),
            ],
        ),
        Row(
            "Failures",
            [
                Graph(
                    "Shut out",
                    "Workers that a router gives work only if there is no other.",
                    Unit.COUNT,
                    [
                        Query(f"max by (worker, role) (baton_worker_shut_out{{{HERE}}})", "{{worker}}"),
                    ],
                ),
                Graph(
                    "Breakers tripped",
                    "By worker.",
                    Unit.PER_SECOND,
                    [
                        Query(
                            f"sum by (worker, role) (rate(baton_breaker_trips_total{{{HERE}}}{RATE}))",
                            "{{worker}} ({{role}})",
                        ),
                    ],
                ),
                Graph(
                    "Failed attempts",
                    "By error, and by the leg that is to blame.",
                    Unit.PER_SECOND,
                    [
                        Query(
                            f"sum by (error, role) (rate(baton_attempt_failures_total{{{HERE}}}{RATE}))",
                            "{{error}} ({{role}})",
                        ),
                    ],
                    stacked=True,
                ),
                Graph(
                    "Refused for their fence",
                    "Words of workers about attempts that are over.",
                    Unit.PER_SECOND,
                    [rate("baton_stale_messages_total", "kind")],
                ),
            ],
        ),
        Row(
            "Processes",
            [
                Graph(
                    "Requests",
                    "By router and end.",
                    Unit.PER_SECOND,
                    [
                        Query(
                            f"sum by (instance, outcome) (rate(baton_requests_total{{{HERE}}}{RATE}))",
                            "{{instance}} {{outcome}}",
                        ),
                    ],
                    stacked=True,
                ),
                Graph(
                    "CPU",
                    "Of routers and bootstrap, in cores. A router uses one at most.",
                    Unit.COUNT,
                    [
                        Query(
                            f'sum by (instance) (rate(process_cpu_seconds_total{{{HERE},job=~".*baton.*"}}{RATE}))',
                            "{{instance}}",
                        ),
                    ],
                ),
                Graph(
                    "Memory",
                    "Resident, of control processes.",
                    Unit.BYTES,
                    [
                        Query(
                            f'sum by (instance) (process_resident_memory_bytes{{{HERE},job=~".*baton.*"}})',
                            "{{instance}}",
                        ),
                    ],
                ),
                Graph(
                    "Heartbeat age",
                    "The oldest, as routers hear them.",
                    Unit.SECONDS,
                    [
                        Query(f"max by (worker) (baton_worker_heartbeat_age_seconds{{{HERE}}})", "{{worker}}"),
                    ],
                ),
            ],
        ),
    ],
)

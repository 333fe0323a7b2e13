"""What to scale, and who is unlike the others."""

from __future__ import annotations

from deploy.observability.boards.queries import HERE, NAMESPACE, RATE, percentiles, total
from deploy.observability.grafana import Dashboard, Graph, Query, Row, Unit

POOLS = Dashboard(
    "baton-pools",
    "Baton / pools",
    "How the prefill and the decode pool are loaded: what to scale, and whether one worker is unlike the others.",
    [NAMESPACE],
    [
        Row(
            "Queues",
            [
                Graph(
                    "Waiting prompt tokens",
                    "That no cache has, by worker: what prefill is scaled by.",
                    Unit.COUNT,
                    [total("baton_waiting_tokens", "worker")],
                ),
                Graph(
                    "Waiting requests",
                    "For compute (prefill) or for KV (decode).",
                    Unit.COUNT,
                    [total("baton_waiting_requests", "worker")],
                ),
                Graph(
                    "Queue wait",
                    "Attempt received to first compute.",
                    Unit.SECONDS,
                    percentiles("baton_queue_wait_seconds", by="role"),
                ),
                Graph(
                    "Oldest waiting request",
                    "Whose first compute has not begun, at any router.",
                    Unit.SECONDS,
                    [
                        Query(f"max(baton_oldest_waiting_request_seconds{{{HERE}}})", "oldest"),
                    ],
                ),
            ],
        ),
        Row(
            "KV pages",
            [
                Graph(
                    "Committed",
                    "Share of a pool that requests hold or that is kept for them: what decode is scaled by.",
                    Unit.SHARE,
                    [
                        Query(f"max by (worker) (baton_kv_committed_ratio{{{HERE}}})", "{{worker}}"),
                    ],
                ),
                Graph(
                    "By owner, decode",
                    "Pages in use over the pool, by kind of owner.",
                    Unit.COUNT,
                    [
                        Query(f'sum by (owner) (baton_kv_pages_used{{{HERE},role="decode"}})', "{{owner}}"),
                    ],
                    stacked=True,
                ),
                Graph(
                    "By owner, prefill",
                    "Pages in use over the pool, by kind of owner.",
                    Unit.COUNT,
                    [
                        Query(f'sum by (owner) (baton_kv_pages_used{{{HERE},role="prefill"}})', "{{owner}}"),
                    ],
                    stacked=True,
                ),
                Graph(
                    "Prefix cache",
                    "Pages that only the prefix cache has: they are given to whoever needs pages.",
                    Unit.COUNT,
                    [total("baton_kv_pages_cached", "role")],
                ),
            ],
        ),
        Row(
            "Steps",
            [
                Graph(
                    "Running", "Attempts in the step loops.", Unit.COUNT, [total("baton_running_requests", "worker")]
                ),
                Graph(
                    "Decode's batch size",
                    "Mean over a request's steps.",
                    Unit.COUNT,
                    percentiles("baton_decode_batch_size", ranks=(50, 95)),
                ),
                Graph(
                    "Decode's step time",
                    "Mean over a request's steps.",
                    Unit.SECONDS,
                    percentiles("baton_decode_step_seconds"),
                ),
                Graph(
                    "Prefill's time", "First chunk to last chunk.", Unit.SECONDS, percentiles("baton_prefill_seconds")
                ),
            ],
        ),
        Row(
            "Health",
            [
                Graph("Ready", "Workers that take new work.", Unit.COUNT, [total("baton_ready", "role")]),
                Graph(
                    "Engine processes started anew",
                    "After a death or a stall.",
                    Unit.PER_SECOND,
                    [
                        Query(
                            f"sum by (worker, cause) (rate(baton_engine_restarts_total{{{HERE}}}{RATE}))",
                            "{{worker}} {{cause}}",
                        ),
                    ],
                ),
                Graph(
                    "Stalls",
                    "Times that a part stopped making progress.",
                    Unit.PER_SECOND,
                    [
                        Query(
                            f"sum by (worker, part) (rate(baton_stalls_total{{{HERE}}}{RATE}))", "{{worker}} {{part}}"
                        ),
                    ],
                ),
            ],
        ),
    ],
)

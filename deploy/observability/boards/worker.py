"""All of one worker."""

from __future__ import annotations

from deploy.observability.boards.queries import NAMESPACE, RATE, WORKER, percentiles, rate, total
from deploy.observability.grafana import Dashboard, Graph, Query, Row, Stat, Unit, Variable

ONE_WORKER = Dashboard(
    "baton-worker",
    "Baton / worker",
    "All of one worker.",
    [NAMESPACE, Variable("worker", 'baton_ready{namespace=~"$namespace"}', "worker", all_values=False)],
    [
        Row(
            "Work",
            [
                Graph(
                    "Requests",
                    "In its step loop, and waiting.",
                    Unit.COUNT,
                    [
                        Query(f"sum(baton_running_requests{{{WORKER}}})", "running"),
                        Query(f"sum(baton_waiting_requests{{{WORKER}}})", "waiting"),
                        Query(f"sum(baton_transfers_in_flight{{{WORKER}}})", "handoffs under way"),
                    ],
                ),
                Graph(
                    "Tokens",
                    "Computed of prompts, and sampled.",
                    Unit.TOKENS_PER_SECOND,
                    [
                        Query(f"sum(rate(baton_prefill_tokens_total{{{WORKER}}}{RATE}))", "prompt tokens"),
                        Query(f"sum(rate(baton_output_tokens_total{{{WORKER}}}{RATE}))", "sampled"),
                    ],
                ),
                Graph(
                    "Attempts by end",
                    "failed and given_back go on elsewhere.",
                    Unit.PER_SECOND,
                    [rate("baton_attempts_total", "outcome", WORKER)],
                    stacked=True,
                ),
                Graph(
                    "Engine steps",
                    "Per second; none while there is nothing to do.",
                    Unit.COUNT,
                    [
                        Query(f"sum(deriv(baton_engine_steps{{{WORKER}}}{RATE}))", "steps/s"),
                    ],
                ),
            ],
        ),
        Row(
            "Time",
            [
                Graph(
                    "Queue wait",
                    "Attempt received to first compute.",
                    Unit.SECONDS,
                    percentiles("baton_queue_wait_seconds", WORKER),
                ),
                Graph(
                    "Prefill", "First chunk to last chunk.", Unit.SECONDS, percentiles("baton_prefill_seconds", WORKER)
                ),
                Graph(
                    "Decode step",
                    "Mean over a request's steps.",
                    Unit.SECONDS,
                    percentiles("baton_decode_step_seconds", WORKER),
                ),
                Graph(
                    "Exposed handoff",
                    "Last chunk computed until decode has taken over.",
                    Unit.SECONDS,
                    percentiles("baton_handoff_exposed_seconds", WORKER),
                ),
            ],
        ),
        Row(
            "KV pages",
            [
                Graph(
                    "By owner",
                    "Pages in use.",
                    Unit.COUNT,
                    [total("baton_kv_pages_used", "owner", WORKER), Query(f"sum(baton_kv_pages{{{WORKER}}})", "pool")],
                ),
                Graph(
                    "Prefix cache",
                    "Pages that only the prefix cache has.",
                    Unit.COUNT,
                    [Query(f"sum(baton_kv_pages_cached{{{WORKER}}})", "cached")],
                ),
                Graph(
                    "Quarantine",
                    "Pages that wait for their writer's word.",
                    Unit.COUNT,
                    [Query(f"sum(baton_kv_pages_quarantined{{{WORKER}}})", "quarantined")],
                ),
                Graph(
                    "Oldest transfer",
                    "Age of the oldest unfinished one.",
                    Unit.SECONDS,
                    [Query(f"max(baton_oldest_transfer_seconds{{{WORKER}}})", "oldest")],
                ),
            ],
        ),
        Row(
            "Health",
            [
                Stat("Ready", "1: it takes new work.", Unit.COUNT, Query(f"max(baton_ready{{{WORKER}}})"), 1, 0.5),
                Stat(
                    "Shut out",
                    "1: a router keeps requests away from it.",
                    Unit.COUNT,
                    Query(f"max(baton_worker_shut_out{{{WORKER}}})"),
                    0.5,
                    1,
                ),
                Stat(
                    "Heartbeat age",
                    "At bootstrap.",
                    Unit.SECONDS,
                    Query(f"max(baton_member_heartbeat_age_seconds{{{WORKER}}})"),
                    2,
                    3,
                ),
                Stat(
                    "Engine processes started anew",
                    "Within the last hour.",
                    Unit.COUNT,
                    Query(f"sum(increase(baton_engine_restarts_total{{{WORKER}}}[1h]))"),
                    1,
                    2,
                ),
                Stat(
                    "Stalls",
                    "Within the last hour.",
                    Unit.COUNT,
                    Query(f"sum(increase(baton_stalls_total{{{WORKER}}}[1h]))"),
                    1,
                    2,
                ),
                Stat("Peers", "Links to the other pool.", Unit.COUNT, Query(f"sum(baton_peers{{{WORKER}}})")),
            ],
        ),
    ],
)

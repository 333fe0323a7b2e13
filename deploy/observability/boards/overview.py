"""What clients see."""

from __future__ import annotations

from deploy.observability.boards.queries import GAP, HERE, NAMESPACE, RATE, TTFT, percentiles, rate, share_within, total
from deploy.observability.grafana import Dashboard, Graph, Query, Row, Stat, Unit

OVERVIEW = Dashboard(
    "baton-overview",
    "Baton / overview",
    "What clients of the cluster see, and what it costs to keep it from them that something has failed.",
    [NAMESPACE],
    [
        Row(
            "Now",
            [
                Stat(
                    "Requests",
                    "That ended, per second.",
                    Unit.PER_SECOND,
                    Query(f"sum(rate(baton_requests_total{{{HERE}}}{RATE}))"),
                ),
                Stat("First token, p95", "From arrival.", Unit.SECONDS, percentiles(TTFT, ranks=(95,))[0], 2.5, 5),
                Stat(
                    "Inter-token, p99", "Between two tokens.", Unit.SECONDS, percentiles(GAP, ranks=(99,))[0], 0.15, 0.3
                ),
                Stat(
                    "Failed",
                    "Share of requests that ended with an error of ours.",
                    Unit.SHARE,
                    Query(
                        f'sum(rate(baton_requests_total{{{HERE},outcome="failed"}}{RATE}))'
                        f" / sum(rate(baton_requests_total{{{HERE}}}{RATE}))"
                    ),
                    0.001,
                    0.01,
                ),
                Stat(
                    "In flight",
                    "Between arrival and end.",
                    Unit.COUNT,
                    Query(f"sum(baton_requests_in_flight{{{HERE}}})"),
                ),
                Stat(
                    "Live workers",
                    "In the view of the router that sees the fewest.",
                    Unit.COUNT,
                    Query(f"sum(min by (role) (baton_workers{{{HERE}}}))"),
                ),
            ],
        ),
        Row(
            "Latency",
            [
                Graph(
                    "Time to first token", "From a request's arrival at the router.", Unit.SECONDS, percentiles(TTFT)
                ),
                Graph(
                    "Inter-token latency",
                    "Between two tokens of a request, at the router.",
                    Unit.SECONDS,
                    percentiles(GAP),
                ),
                Graph(
                    "In time",
                    "Goodput: the share of first tokens within 2.5 s, and of gaps within 80 ms.",
                    Unit.SHARE,
                    [share_within(TTFT, "2.5", "first token ≤ 2.5 s"), share_within(GAP, "0.08", "gap ≤ 80 ms")],
                ),
            ],
        ),
        Row(
            "Traffic",
            [
                Graph(
                    "Requests by end",
                    "rejected: the client's fault, or a 429.",
                    Unit.PER_SECOND,
                    [rate("baton_requests_total", "outcome")],
                    stacked=True,
                ),
                Graph(
                    "Tokens",
                    "Computed of prompts, and sampled.",
                    Unit.TOKENS_PER_SECOND,
                    [
                        Query(f"sum(rate(baton_prefill_tokens_total{{{HERE}}}{RATE}))", "prompt tokens computed"),
                        Query(f"sum(rate(baton_output_tokens_total{{{HERE}}}{RATE}))", "tokens sampled"),
                    ],
                ),
                Graph(
                    "Lengths, median",
                    "In tokens, of requests.",
                    Unit.COUNT,
                    [
                        Query(percentiles("baton_request_prompt_tokens", ranks=(50,))[0].expression, "prompt"),
                        Query(percentiles("baton_request_output_tokens", ranks=(50,))[0].expression, "output"),
                    ],
                ),
            ],
        ),
        Row(
            "What went wrong",
            [
                Graph(
                    "Errors by class",
                    "Told to clients.",
                    Unit.PER_SECOND,
                    [rate("baton_request_errors_total", "error")],
                    stacked=True,
                ),
                Graph(
                    "Refused",
                    "429s, by the bound that was reached.",
                    Unit.PER_SECOND,
                    [rate("baton_admission_refusals_total", "reason")],
                    stacked=True,
                ),
                Graph(
                    "Recoveries",
                    "Requests that went on as another attempt, unnoticed. drained and retracted are in order.",
                    Unit.PER_SECOND,
                    [rate("baton_request_resumptions_total", "reason")],
                    stacked=True,
                ),
            ],
        ),
        Row(
            "Membership",
            [
                Graph("Members", "Workers with a lease at bootstrap.", Unit.COUNT, [total("baton_members", "role")]),
                Graph(
                    "Left",
                    "goodbye: in order; silence: no heartbeat until the lease was over.",
                    Unit.PER_SECOND,
                    [rate("baton_member_leaves_total", "reason")],
                ),
                Graph(
                    "Heartbeat age, oldest",
                    "Of live members, at bootstrap.",
                    Unit.SECONDS,
                    [
                        Query(f"max by (role) (baton_member_heartbeat_age_seconds{{{HERE}}})", "{{role}}"),
                    ],
                ),
            ],
        ),
    ],
)

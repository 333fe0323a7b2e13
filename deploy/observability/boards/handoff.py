"""KV pages on their way."""

from __future__ import annotations

from deploy.observability.boards.queries import HERE, NAMESPACE, RATE, percentiles, rate, total
from deploy.observability.grafana import Dashboard, Graph, Query, Row, Unit

HANDOFF = Dashboard(
    "baton-handoff",
    "Baton / handoff",
    "KV pages on their way from prefill to decode: what it costs a request, and what fails.",
    [NAMESPACE],
    [
        Row(
            "What a request notices",
            [
                Graph(
                    "Exposed",
                    "Last chunk computed until decode has taken over.",
                    Unit.SECONDS,
                    percentiles("baton_handoff_exposed_seconds"),
                ),
                Graph(
                    "Grant wait",
                    "OFFER to GRANT: how long decode had no pages.",
                    Unit.SECONDS,
                    percentiles("baton_grant_wait_seconds"),
                ),
                Graph(
                    "Writing",
                    "Time with writes under way, beside prefill's compute.",
                    Unit.SECONDS,
                    percentiles("baton_handoff_seconds"),
                ),
            ],
        ),
        Row(
            "Volume",
            [
                Graph(
                    "Written",
                    "By worker.",
                    Unit.BYTES_PER_SECOND,
                    [rate("baton_handoff_bytes_total", "worker")],
                    stacked=True,
                ),
                Graph(
                    "Size of a handoff",
                    "Pages that decode had already are not sent.",
                    Unit.BYTES,
                    percentiles("baton_handoff_size_bytes", ranks=(50, 99)),
                ),
                Graph(
                    "Under way", "Between OFFER and end.", Unit.COUNT, [total("baton_transfers_in_flight", "worker")]
                ),
            ],
        ),
        Row(
            "What fails",
            [
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
                    "Quarantine",
                    "Granted pages that wait for their writer's word: nobody may use them.",
                    Unit.COUNT,
                    [total("baton_kv_pages_quarantined", "worker")],
                ),
                Graph(
                    "Oldest transfer",
                    "By worker; kv.write_timeout_seconds ends it.",
                    Unit.SECONDS,
                    [
                        Query(f"max by (worker) (baton_oldest_transfer_seconds{{{HERE}}})", "{{worker}}"),
                    ],
                ),
                Graph(
                    "Refused for their fence",
                    "Messages of another life or attempt: some after each failure, or a defect.",
                    Unit.PER_SECOND,
                    [
                        Query(
                            f"sum by (worker) (rate(baton_worker_stale_messages_total{{{HERE}}}{RATE}))", "{{worker}}"
                        ),
                    ],
                ),
            ],
        ),
        Row(
            "Links",
            [
                Graph("Peers", "Links to workers of the other pool.", Unit.COUNT, [total("baton_peers", "worker")]),
                Graph(
                    "Refused links",
                    "Or ended for a frame that broke the contract.",
                    Unit.PER_SECOND,
                    [
                        Query(
                            f"sum by (worker, link) (rate(baton_refused_links_total{{{HERE}}}{RATE}))",
                            "{{worker}} {{link}}",
                        ),
                    ],
                ),
                Graph(
                    "Refused for want of proof",
                    "Not counted: no_proof, with which each exchange begins.",
                    Unit.PER_SECOND,
                    [
                        rate("baton_unauthorized_requests_total", "reason", f'{HERE},reason!="no_proof"'),
                    ],
                ),
            ],
        ),
    ],
)

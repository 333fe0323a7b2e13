"""For each alert a story in which it must fire, and one in which it must not.

A story is values by series, as Prometheus' rule tests write them: `5+1x60` is 5, and one more at each of 60 minutes.
"""

from __future__ import annotations

from typing import NamedTuple

HOUR = 60
NS = 'namespace="a"'
WORKER = f'{NS},worker="decode-0",role="decode"'


class AlertCase(NamedTuple):
    fires: dict[str, str]
    """Values by series."""
    quiet: dict[str, str]
    labels: dict[str, str]
    """Of the alert that fires, without alertname and severity."""


def histogram(name: str, fast: int, slow: int, bounds: tuple[str, str]) -> dict[str, str]:
    """So many observations a minute below the first bound, and between it and the second."""
    first, second = bounds
    everything = f"0+{fast + slow}x{HOUR}"
    return {
        f'{name}_bucket{{{NS},le="{first}"}}': f"0+{fast}x{HOUR}",
        f'{name}_bucket{{{NS},le="{second}"}}': everything,
        f'{name}_bucket{{{NS},le="+Inf"}}': everything,
        f"{name}_count{{{NS}}}": everything,
    }


def requests(finished: int, failed: int) -> dict[str, str]:
    """So many a minute."""
    series = f'baton_requests_total{{{NS},route="chat",outcome='
    return {f'{series}"finished"}}': f"0+{finished}x{HOUR}", f'{series}"failed"}}': f"0+{failed}x{HOUR}"}


def gauge(name: str, labels: str, value: float | str) -> dict[str, str]:
    return {f"{name}{{{labels}}}": value if isinstance(value, str) else f"{value}x{HOUR}"}


TTFT, GAP, EXPOSED = (
    "baton_time_to_first_token_seconds",
    "baton_inter_token_latency_seconds",
    "baton_handoff_exposed_seconds",
)
HERE = {"namespace": "a"}
THERE = {"namespace": "a", "worker": "decode-0", "role": "decode"}

CASES: dict[str, AlertCase] = {
    "BatonTimeToFirstTokenHigh": AlertCase(
        histogram(TTFT, 90, 10, ("5.0", "10.0")), histogram(TTFT, 96, 4, ("5.0", "10.0")), HERE
    ),
    "BatonInterTokenLatencyHigh": AlertCase(
        histogram(GAP, 980, 20, ("0.3", "0.6")), histogram(GAP, 995, 5, ("0.3", "0.6")), HERE
    ),
    "BatonRequestsFailing": AlertCase(requests(97, 3), requests(1000, 5), HERE),
    "BatonRequestsRefused": AlertCase(
        requests(100, 0) | gauge("baton_admission_refusals_total", f'{NS},reason="wait"', f"0+10x{HOUR}"),
        requests(100, 0) | gauge("baton_admission_refusals_total", f'{NS},reason="wait"', f"0+4x{HOUR}"),
        HERE,
    ),
    "BatonQueueOld": AlertCase(
        gauge("baton_oldest_waiting_request_seconds", NS, f"0x50 31+60x{HOUR}"),
        gauge("baton_oldest_waiting_request_seconds", NS, f"0x58 100x{HOUR}"),
        HERE,
    ),
    "BatonNoWorkers": AlertCase(
        gauge("baton_workers", f'{NS},role="prefill"', f"2x50 0x{HOUR}")
        | gauge("baton_workers", f'{NS},role="decode"', 2),
        # A unified cluster never had a prefill worker.
        gauge("baton_workers", f'{NS},role="prefill"', 0) | gauge("baton_workers", f'{NS},role="decode"', 2),
        {"namespace": "a", "role": "prefill"},
    ),
    "BatonRouterAbsent": AlertCase({}, gauge("baton_workers", f'{NS},role="decode"', 0), {}),
    "BatonHeartbeatsLost": AlertCase(
        gauge("baton_member_leaves_total", f'{NS},reason="silence"', f"0x55 1x{HOUR}"),
        gauge("baton_member_leaves_total", f'{NS},reason="goodbye"', f"0x55 1x{HOUR}"),
        HERE,
    ),
    "BatonWorkersOutOfReach": AlertCase(
        gauge("baton_members", f'{NS},role="decode"', 3)
        | gauge("baton_workers", f'{NS},role="decode",instance="r0"', 3)
        | gauge("baton_workers", f'{NS},role="decode",instance="r1"', 2),
        gauge("baton_members", f'{NS},role="decode"', 3)
        | gauge("baton_workers", f'{NS},role="decode",instance="r0"', 3)
        | gauge("baton_workers", f'{NS},role="decode",instance="r1"', f"2x58 3x{HOUR}"),
        {"namespace": "a", "role": "decode"},
    ),
    "BatonWorkerNotReady": AlertCase(
        gauge("baton_ready", WORKER, f"1x40 0x{HOUR}"), gauge("baton_ready", WORKER, f"1x55 0x{HOUR}"), THERE
    ),
    "BatonStalled": AlertCase(
        gauge("baton_stalls_total", f'{WORKER},part="engine"', f"0x50 1x{HOUR}"),
        gauge("baton_stalls_total", f'{WORKER},part="engine"', f"0x10 1x{HOUR}"),
        {**THERE, "part": "engine"},
    ),
    "BatonEngineRestarts": AlertCase(
        gauge("baton_engine_restarts_total", f'{WORKER},cause="death"', f"0x40 1x5 3x{HOUR}"),
        gauge("baton_engine_restarts_total", f'{WORKER},cause="death"', f"0x40 1x{HOUR}"),
        {**THERE, "cause": "death"},
    ),
    "BatonProcessRestarts": AlertCase(
        gauge("process_start_time_seconds", f'{NS},job="baton-router",instance="r0"', f"1x40 2x5 3x5 4x{HOUR}"),
        gauge("process_start_time_seconds", f'{NS},job="node",instance="r0"', f"1x40 2x5 3x5 4x{HOUR}"),
        {"namespace": "a", "job": "baton-router", "instance": "r0"},
    ),
    "BatonBreakerOpen": AlertCase(
        gauge("baton_worker_shut_out", f'{WORKER},instance="r0"', f"0x50 1x{HOUR}")
        | gauge("baton_worker_shut_out", f'{WORKER},instance="r1"', 0),
        gauge("baton_worker_shut_out", f'{WORKER},instance="r0"', f"0x50 1 0x{HOUR}"),
        THERE,
    ),
    "BatonKVPoolFull": AlertCase(
        gauge("baton_kv_committed_ratio", WORKER, 0.95),
        gauge("baton_kv_committed_ratio", WORKER, 0.95)
        | gauge("baton_kv_committed_ratio", f'{NS},worker="decode-1",role="decode"', 0.5),
        {"namespace": "a", "role": "decode"},
    ),
    "BatonRetractions": AlertCase(
        gauge("baton_request_resumptions_total", f'{NS},reason="retracted"', f"0+12x{HOUR}"),
        gauge("baton_request_resumptions_total", f'{NS},reason="retracted"', f"0+3x{HOUR}"),
        {"namespace": "a", "reason": "retracted"},
    ),
    "BatonQuarantine": AlertCase(
        gauge("baton_kv_pages_quarantined", WORKER, 20) | gauge("baton_kv_pages", WORKER, 100),
        # A worker without an engine process has no pages at all.
        gauge("baton_kv_pages_quarantined", WORKER, 0) | gauge("baton_kv_pages", WORKER, 0),
        THERE,
    ),
    "BatonTransfersFail": AlertCase(
        gauge("baton_attempt_failures_total", f'{NS},error="PeerUnreachable",role="decode"', f"0+6x{HOUR}"),
        gauge("baton_attempt_failures_total", f'{NS},error="WorkerLost",role="decode"', f"0+6x{HOUR}"),
        HERE,
    ),
    "BatonTransferOld": AlertCase(
        gauge("baton_oldest_transfer_seconds", WORKER, f"0x55 40+60x{HOUR}"),
        gauge("baton_oldest_transfer_seconds", WORKER, 20),
        THERE,
    ),
    "BatonHandoffSlow": AlertCase(
        histogram(EXPOSED, 95, 5, ("1.0", "2.5")), histogram(EXPOSED, 1000, 1, ("1.0", "2.5")), HERE
    ),
    "BatonRecoveriesHigh": AlertCase(
        requests(100, 0) | gauge("baton_request_resumptions_total", f'{NS},reason="worker_lost"', f"0+10x{HOUR}"),
        requests(100, 0) | gauge("baton_request_resumptions_total", f'{NS},reason="drained"', f"0+10x{HOUR}"),
        HERE,
    ),
    "BatonBootstrapAway": AlertCase({}, gauge("baton_members", f'{NS},role="decode"', 0), {}),
    "BatonTargetDown": AlertCase(
        gauge("up", f'{NS},job="baton-worker",instance="decode-0"', f"1x50 0x{HOUR}"),
        gauge("up", f'{NS},job="node",instance="decode-0"', f"1x50 0x{HOUR}"),
        {"namespace": "a", "job": "baton-worker", "instance": "decode-0"},
    ),
    "BatonStrangers": AlertCase(
        gauge("baton_unauthorized_requests_total", f'{NS},reason="foreign_challenge"', f"0+12x{HOUR}"),
        gauge("baton_unauthorized_requests_total", f'{NS},reason="no_proof"', f"0+12x{HOUR}"),
        {"namespace": "a", "reason": "foreign_challenge"},
    ),
}

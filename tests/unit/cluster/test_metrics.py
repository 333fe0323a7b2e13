"""What a scrape must not show: series of workers that are gone, and nothing at all where there could be an increase."""

from __future__ import annotations

import pytest

from cluster.layout import KVLayout
from cluster.messages import Load, Member, MemberStatus, ModelCard, Role
from cluster.metrics import BootstrapMetrics, RouterMetrics, SeenWorker, WorkerMetrics

LAYOUT = KVLayout("model", "float32", 16, 2, 1, 8)


def status(worker: str) -> MemberStatus:
    member = Member(worker, Role.DECODE, 7, "http://127.0.0.1:1", LAYOUT, ModelCard("m", 512, 100), "nixl", 10, 4)
    return MemberStatus(member, Load(), 0.5)


def workers_of(registry) -> set[str]:
    """All that some series speaks of."""
    samples = (sample for family in registry.collect() for sample in family.samples)
    return {sample.labels["worker"] for sample in samples if "worker" in sample.labels}


def test_who_is_no_member_any_more_is_in_none_of_bootstraps_series():
    metrics = BootstrapMetrics()
    metrics.observe([status("decode-0"), status("decode-1")], watchers=2)
    assert workers_of(metrics.registry) == {"decode-0", "decode-1"}
    metrics.observe([status("decode-1")], watchers=2)
    assert workers_of(metrics.registry) == {"decode-1"}
    assert metrics.registry.get_sample_value("baton_members", {"role": "decode"}) == 1


def test_who_is_gone_takes_its_series_at_the_router_along_and_its_counts():
    metrics = RouterMetrics()
    both = [SeenWorker(name, Role.DECODE, 1, 0.1, shut_out=False) for name in ("decode-0", "decode-1")]
    metrics.observe_workers(both)
    metrics.breaker_tripped("decode-0", Role.DECODE)
    assert workers_of(metrics.registry) == {"decode-0", "decode-1"}
    metrics.observe_workers(both[1:])
    assert workers_of(metrics.registry) == {"decode-1"}


def test_a_worker_with_two_lives_has_the_attempts_of_both():
    metrics = RouterMetrics()
    metrics.observe_workers([SeenWorker("d", Role.DECODE, 3, None, False), SeenWorker("d", Role.DECODE, 2, 0.1, False)])
    labels = {"worker": "d", "role": "decode"}
    assert metrics.registry.get_sample_value("baton_worker_attempts", labels) == 5
    assert metrics.registry.get_sample_value("baton_worker_heartbeat_age_seconds", labels) == 0.1


@pytest.mark.parametrize(
    ("series", "labels"),
    [
        ("baton_attempts_total", {"outcome": "failed"}),
        ("baton_engine_restarts_total", {"cause": "death"}),
        ("baton_stalls_total", {"part": "transfers"}),
        ("baton_worker_stale_messages_total", {}),
    ],
)
def test_the_first_time_is_an_increase(series, labels):
    """Prometheus sees none where a series begins with 1."""
    metrics = WorkerMetrics("decode-0", Role.DECODE)
    assert metrics.registry.get_sample_value(series, {"worker": "decode-0", "role": "decode", **labels}) == 0


def test_stale_messages_of_all_lives_of_the_engine_process_add_up():
    metrics = WorkerMetrics("decode-0", Role.DECODE)
    for told in (2, 5, 0, 1):  # the third word is of a new life
        metrics.observe_load(Load(stale_messages=told))
    labels = {"worker": "decode-0", "role": "decode"}
    assert metrics.registry.get_sample_value("baton_worker_stale_messages_total", labels) == 6


def test_a_worker_without_an_engine_process_has_no_work():
    metrics = WorkerMetrics("decode-0", Role.DECODE)
    metrics.observe_load(Load(running=3, pages_used=7, pages_total=10, owners={"sequence": 7}))
    metrics.observe_ready(ready=True)
    metrics.engine_gone()
    labels = {"worker": "decode-0", "role": "decode"}
    for gauge in ("baton_running_requests", "baton_kv_pages", "baton_kv_committed_ratio", "baton_ready"):
        assert metrics.registry.get_sample_value(gauge, labels) == 0
    assert metrics.registry.get_sample_value("baton_kv_pages_used", {**labels, "owner": "sequence"}) is None

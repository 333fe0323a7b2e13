"""What pools are scaled by, as a scrape shows it."""

from cluster.messages import Load, Role
from cluster.metrics import WorkerMetrics, render


def test_a_workers_load_is_in_its_scrape():
    metrics = WorkerMetrics("decode-0", Role.DECODE)
    metrics.observe_load(Load(queued_tokens=700, pages_used=30, pages_total=40, pages_cached=10))
    text = render(metrics.registry).decode()
    assert 'baton_waiting_tokens{role="decode",worker="decode-0"} 700.0' in text
    assert 'baton_kv_committed_ratio{role="decode",worker="decode-0"} 0.75' in text, "cached pages are free"

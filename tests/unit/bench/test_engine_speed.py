"""What the engine's figures look like on paper."""

from __future__ import annotations

from bench.engine_speed import EngineReport
from bench.machine import describe_setting
from cluster.engine_speed import EngineSpeed


def speed(**changes):
    fields = {
        "dtype": "bfloat16", "threads": 1, "kernels": "native", "product_flops_per_second": 5e11,
        "read_bytes_per_second": 44e9, "prefill_tokens_per_second": 1890.0, "prefill_share_of_peak": 0.75,
        "decode_tokens_per_second": {1: 109.0, 8: 444.0}, "decode_share_of_reading": 0.55,
    }  # fmt: skip
    return EngineSpeed(**fields | changes)


def test_a_share_below_its_target_is_shown_as_not_met():
    page = EngineReport(describe_setting(), [speed(), speed(threads=2, decode_share_of_reading=0.61)]).page
    figures, targets = page.tables
    assert figures.rows[0] == ["bfloat16, 1 thread", "500", "44.0", "1,890", "75%", "109", "444", "55%"]
    assert [row[-1] for row in targets.rows] == ["met", "not met", "met", "met"]
    assert targets.rows[2][0] == "prefill / product peak (bfloat16, 2 threads)"

"""What is said of a cluster that does nothing."""

import pytest

from bench.idle import IdleCluster, IdleReport
from bench.machine import describe_setting
from bench.report import markdown


@pytest.mark.parametrize(("busiest", "verdict"), [(1.9, "met"), (2.1, "not met")])
def test_the_busiest_member_decides(busiest, verdict):
    clusters = [
        IdleCluster("nixl", {"prefill-0": 0.2, "router": 0.05}),
        IdleCluster("mooncake", {"prefill-0": busiest, "decode-0": 0.3}),
    ]
    report = IdleReport(describe_setting(), "demo", 20.0, clusters)
    assert [target.met for target in report.targets] == [True, verdict == "met"]
    lines = markdown(report.page, report.setting).splitlines()
    assert "| decode-0 | - | 0.30 |" in lines
    assert f"| busiest member, mooncake, percent of a core | {busiest:.2f} | ≤ 2.00 | {verdict} |" in lines

"""Handoffs beside a bare transfer engine: how the work is divided, and what is said of it."""

import msgspec

from bench.handoff.measure import Bandwidth, Exposed, Handed, split_evenly
from bench.handoff.report import HandoffReport
from bench.machine import describe_setting
from bench.memcpy import Copied
from bench.report import markdown
from bench.statistics import Repeated
from cluster.config import TransferName


def test_batches_are_even_and_complete():
    assert split_evenly(94, 3) == [31, 31, 32]
    assert split_evenly(94, 1) == [94]
    assert split_evenly(3, 3) == [1, 1, 1]


def handed(transfer, baton, share):
    exposed = Exposed(512, *(Repeated.over([seconds]) for seconds in (1.0, share, share / 2, share)))
    return Handed(transfer, 1500, Bandwidth(94, 368_640, 1, Repeated.over([baton]), Repeated.over([10.0])), exposed)


def test_each_engine_is_held_against_itself_and_its_own_target():
    report = HandoffReport(
        describe_setting(),
        0,
        [handed(TransferName.NIXL, 9.0, 0.04), handed(TransferName.MOONCAKE, 8.9, 0.04)],
        Copied(368_640, 94, 0.002),
    )
    lines = markdown(report.page, report.setting).splitlines()
    assert "| nixl: bandwidth / that of the bare engine | 0.90 | ≥ 0.90 | met |" in lines
    assert "| nixl: exposed handoff / prefill, 1,500 tokens | 0.04 | ≤ 0.03 | not met |" in lines
    assert "| mooncake: bandwidth / that of the bare engine | 0.89 | ≥ 0.90 | not met |" in lines
    assert "| mooncake: exposed handoff / prefill, 1,500 tokens | 0.04 | ≤ 0.06 | met |" in lines
    assert "| nixl | 1,500 | 512 | 1,000 | 40.0 | 20.0 | 4.0% |" in lines
    assert "| memcpy | 94 x 368,640 B | - | 17.3 | - |" in lines
    assert msgspec.json.decode(msgspec.json.encode(report), type=HandoffReport) == report

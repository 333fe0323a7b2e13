"""What a comparison says to people and to programs."""

from io import StringIO

import msgspec
import pytest
from rich.console import Console

from bench.compare import Comparison, Result, steadiest
from bench.compare_report import CompareReport
from bench.machine import describe_setting
from bench.measure import HandoffShape, Measurement, typical_handoff
from bench.memcpy import Copied
from bench.records import Record
from bench.report import markdown, show, write
from bench.statistics import Repeated
from bench.targets import at_least, at_most, targets_table
from bench.tuning import Tuned
from bench.workload import WORKLOADS
from cluster.timings import HandoffTimings


def result(name, inter_token, **more):
    figures = {"inter_token_p99": inter_token} | more
    one = Measurement(figures, {"router": 0.5}, short_requests=10, long_requests=2, errors=[], others_share=0.031)
    repeated = {key: Repeated(value, value, value * 2) for key, value in figures.items()}
    return Result(name, f"{name}.yaml", [], [one], repeated, {"router": Repeated(0.5, 0.5, 0.5)}, HandoffShape(10, 2))


SPLIT = result("1P1D", 30.0, inter_token_p99_over_p50=1.2, handoff_gigabytes_per_second=5.0)
UNIFIED = result("unified", 300.0)
REPORT = CompareReport(
    setting=describe_setting(),
    workload=WORKLOADS["mixed"],
    seed=0,
    comparison=Comparison(
        [SPLIT, UNIFIED], "unified", {"inter_token_p99": 0.1}, Copied(page_bytes=368_640, pages=94, seconds=0.002)
    ),
    tuned=[
        Tuned("unified", [result("unified, chunk 64", 200.0), result("unified, chunk 512", 300.0)], "unified, chunk 64")
    ],
)


def test_the_table_has_all_sides_their_ratio_and_the_plain_copy():
    lines = markdown(REPORT.page, REPORT.setting).splitlines()
    row = next(line for line in lines if "inter-token of steady streams, p99 |" in line)
    assert row == (
        "| inter-token of steady streams, p99 | ms | 30.0 (30.0 to 60.0) | 300 (300 to 600) | 0.10 | lower |"
    )
    assert any("handoff" in line and "5.00" in line and "| - |" in line for line in lines)
    assert "| memcpy of 35 MB in 94 pages | GB/s | 17.33 | - | - | higher |" in lines
    assert any("type 7" in line for line in lines)
    assert "Other processes used up to 3% of these cores." in lines


def test_targets_stand_beside_what_was_measured():
    rows = {row[0]: row[1:] for row in targets_table(REPORT.targets).rows}
    assert rows["inter-token p99 / p50 of 1P1D"] == ["1.20", "≤ 1.50", "met"]
    assert rows["inter-token p99 / that of unified"] == ["0.10", "≤ 0.33", "met"]
    assert rows["TTFT p50 / that of unified"] == ["-", "≤ 2.00", "-"]


@pytest.mark.parametrize(("value", "met"), [(0.89, False), (0.9, True), (None, None)])
def test_a_target_is_met_at_its_limit(value, met):
    assert at_least("", value, 0.9).met is met
    assert at_most("", None if value is None else -value, -0.9).met is met


def test_the_trials_before_are_told_and_the_chosen_one_is_marked():
    text = markdown(REPORT.page, REPORT.setting)
    assert "| unified, chunk 64 * | 200 (200 to 400) | - | - | - | 0 |" in text
    assert "| unified, chunk 512 | 300" in text


def test_the_steadiest_is_that_of_least_p99_of_those_that_carry_the_load():
    def one(name, p99, tokens):
        return result(name, p99, total_tokens_per_second=tokens)

    assert steadiest([one("slow", 50.0, 890.0), one("able", 100.0, 950.0), one("fast", 300.0, 1000.0)]).name == "able"
    assert steadiest([one("able", 100.0, 950.0), one("equal", 104.0, 1000.0)]).name == "equal"
    assert steadiest([one("alone", 100.0, 1.0)]).name == "alone"


def test_a_report_can_be_read_back(tmp_path):
    data, text = write(REPORT, REPORT.setting, REPORT.page, tmp_path / "results")
    assert msgspec.json.decode(data.read_bytes(), type=CompareReport) == REPORT
    assert text.read_text() == markdown(REPORT.page, REPORT.setting)
    assert data.name.startswith("compare-mixed-20")


def test_the_terminal_shows_the_same_rows():
    console = Console(width=140, file=StringIO())
    show(REPORT.page, console)
    assert "inter-token of steady streams, p99" in console.file.getvalue()
    assert "not met" not in console.file.getvalue()


def test_the_typical_handoff_is_the_median_one():
    def record(pages):
        return Record("r", handoff=HandoffTimings(0.0, 0.1, 0.0, pages, pages * 1000))

    assert typical_handoff([record(90), record(94), record(1)]) == (1000, 90)
    assert typical_handoff([Record("r")]) is None

"""What a comparison says to people and to programs."""

from io import StringIO

import msgspec
from rich.console import Console

from bench.compare import Comparison, Result
from bench.machine import describe_setting
from bench.measure import Measurement, typical_handoff
from bench.memcpy import Copied
from bench.records import Record
from bench.report import Report, markdown, show, write
from bench.statistics import Repeated
from bench.workload import WORKLOADS
from cluster.messages import HandoffTimings


def result(name, inter_token, **more):
    figures = {"inter_token_p99": inter_token} | more
    one = Measurement(figures, {"router": 0.5}, short_requests=10, long_requests=2, errors=[], others_share=0.031)
    repeated = {key: Repeated(value, value, value * 2) for key, value in figures.items()}
    return Result(name, f"{name}.yaml", [one], repeated, {"router": Repeated(0.5, 0.5, 0.5)})


REPORT = Report(
    setting=describe_setting(),
    workload=WORKLOADS["mixed"],
    seed=0,
    comparison=Comparison(
        [result("1P1D", 30.0, handoff_gigabytes_per_second=5.0), result("unified", 300.0)],
        {"inter_token_p99": 0.1},
        Copied(page_bytes=368_640, pages=94, seconds=0.002),
    ),
)


def test_the_table_has_both_sides_their_ratio_and_the_plain_copy():
    lines = markdown(REPORT).splitlines()
    row = next(line for line in lines if "inter-token of steady streams, p99" in line)
    assert row == (
        "| inter-token of steady streams, p99 | ms | 30.0 (30.0 to 60.0) | 300 (300 to 600) | 0.10 | lower |"
    )
    assert any("handoff" in line and "5.00" in line and "| - |" in line for line in lines)
    assert any("memcpy of 35 MB in 94 pages" in line and "17.3" in line for line in lines)
    assert any("type 7" in line for line in lines)
    assert "Other processes used up to 3% of these cores." in lines


def test_a_report_can_be_read_back(tmp_path):
    data, text = write(REPORT, tmp_path / "results")
    assert msgspec.json.decode(data.read_bytes(), type=Report) == REPORT
    assert text.read_text() == markdown(REPORT)


def test_the_terminal_shows_the_same_rows():
    console = Console(width=140, file=StringIO())
    show(REPORT, console)
    assert "inter-token of steady streams, p99" in console.file.getvalue()


def test_the_typical_handoff_is_the_median_one():
    def record(pages):
        return Record("r", handoff=HandoffTimings(0.0, 0.1, 0.0, pages, pages * 1000))

    assert typical_handoff([record(90), record(94), record(1)]) == (1000, 90)
    assert typical_handoff([Record("r")]) is None

"""Curves: which points are measured, and what of a run counts."""

import sys

import msgspec
import pytest

from bench.client import Timeline
from bench.curves.curve import DecodeCurve, DecodePoint, PrefillCurve, PrefillPoint
from bench.curves.decode import OUTPUT_TOKENS, DecodeGrid
from bench.curves.prefill import PrefillGrid
from bench.curves.together import while_all_decode
from bench.machine import describe_setting
from bench.pictures import draw, read
from bench.report import markdown
from bench.statistics import Repeated
from cluster.errors import ConfigError


def timeline(*arrivals, prompt_tokens=100):
    line = Timeline(stream="alone", prompt_tokens=prompt_tokens, sent_at=0.0)
    line.arrivals, line.counts = list(arrivals), [1] * len(arrivals)
    return line


def test_only_the_time_of_the_whole_batch_counts():
    first = timeline(1.0, 1.1, 1.2, 2.9, 3.0, 3.1, 3.2, 3.3)  # without the other one until 2.9
    second = timeline(2.9, 3.0, 3.1, 3.2, prompt_tokens=200)
    found = while_all_decode([first, second])
    assert found.gap_seconds == pytest.approx(0.1)
    # Of its first three tokens, and then half of the four that it gets while both decode.
    assert found.context_tokens == pytest.approx(((100 + 3 + 2) + (200 + 0 + 2)) / 2)


def test_a_client_that_looked_late_does_not_speed_the_worker_up():
    assert while_all_decode([timeline(1.0, 1.3, 1.3, 1.3, 1.4)]).gap_seconds == pytest.approx(0.1)


def test_a_batch_that_was_never_whole_gives_nothing():
    assert while_all_decode([timeline(1.0, 1.1), timeline(2.0, 2.1)]) is None
    assert while_all_decode([timeline(1.0), timeline(1.0, 2.0)]) is None
    assert while_all_decode([]) is None


def test_prompts_that_do_not_fit_are_left_out():
    grid = PrefillGrid(new_tokens=[16, 1000], cached_tokens=[0, 1024], prompts=[1, 4])
    assert set(grid.cells(context_length=1030)) == {(16, 0, 1), (16, 0, 4), (1000, 0, 1), (1000, 0, 4)}
    assert (1000, 1024, 1) in set(grid.cells(context_length=2048))
    assert (1000, 1024, 4) not in set(grid.cells(context_length=2048))


def test_each_context_is_prefilled_once_and_the_pool_holds_the_largest_batch():
    grid = DecodeGrid(batches=[1, 8, 2], context_tokens=[512, 16, 4096])
    assert list(grid.cells(context_length=1024)) == [(8, 16), (2, 16), (1, 16), (8, 512), (2, 512), (1, 512)]
    assert grid.pool_tokens >= 8 * (4096 + OUTPUT_TOKENS)


@pytest.fixture
def curves():
    shared = {
        "setting": describe_setting(), "topology": "model: {}", "model": "tiny", "cores": [1], "repeats": 3, "seed": 0,
    }  # fmt: skip
    took = Repeated(0.25, 0.2, 0.3)
    prefill = PrefillCurve(points=[PrefillPoint(500, 1024, 1, took)], **shared)
    return prefill, DecodeCurve(points=[DecodePoint(8, 256, 280, took)], **shared)


def test_a_planner_reads_what_people_read(curves):
    prefill, decode = curves
    assert "| 500 | 1,024 | 1 | 250 (200 to 300) | 2,000 |" in markdown(prefill.page, prefill.setting).splitlines()
    assert "| 8 | 256 | 280 | 250 (200 to 300) | 32.0 |" in markdown(decode.page, decode.setting).splitlines()
    for curve in curves:
        assert msgspec.json.decode(msgspec.json.encode(curve), type=PrefillCurve | DecodeCurve) == curve


def test_a_curve_becomes_a_picture_of_moderate_size(curves, tmp_path):
    pytest.importorskip("matplotlib")
    for curve in curves:
        data, picture = tmp_path / "curve.json", tmp_path / "curve.svg"
        data.write_bytes(msgspec.json.encode(curve))
        draw(read(data), picture)
        assert "worker alone, tiny" in picture.read_text()
        assert picture.stat().st_size < 150_000


def test_what_is_missing_for_a_picture_is_named(curves, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="can't be read"):
        read(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"kind": "compare"}')
    with pytest.raises(ConfigError, match="no result that can be drawn"):
        read(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="svg or"):
        draw(curves[0], tmp_path / "curve.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="make setup-bench"):
        draw(curves[0], tmp_path / "curve.svg")

"""Goodput: who gets which requests, when a rate counts as carried, and which rate is found."""

import msgspec
import pytest

from bench.client import Timeline
from bench.goodput.arrivals import Lengths, Mix, draw_arrivals
from bench.goodput.outcome import Objective, judge
from bench.goodput.report import GoodputReport
from bench.goodput.search import RateSearch
from bench.goodput.trial import Conditions, Curve, rank
from bench.machine import describe_setting
from bench.pictures import draw
from bench.report import markdown

MIX = Mix(prompt=Lengths(64, 2000), output=Lengths(16, 200))
OBJECTIVE = Objective(first_token_seconds=4.0, gap_seconds=0.08, share=0.9)


def timeline(first=1.0, gaps=(0.05, 0.05), **more):
    line = Timeline(stream="poisson", prompt_tokens=100, sent_at=10.0)
    line.arrivals = [10.0 + first]
    for gap in gaps:
        line.arrivals.append(line.arrivals[-1] + gap)
    line.counts = [1] * len(line.arrivals)
    line.finish_reason, line.ended_at = "length", line.arrivals[-1]
    for name, value in more.items():
        setattr(line, name, value)
    return line


def unanswered():
    return Timeline(stream="poisson", prompt_tokens=100, sent_at=10.0)


def test_the_same_requests_come_at_every_rate_only_faster():
    slow, fast = draw_arrivals(MIX, 2.0, 100.0, seed=3), draw_arrivals(MIX, 4.0, 50.0, seed=3)
    assert [each[1:] for each in slow] == [each[1:] for each in fast]
    assert [each.at for each in slow] == pytest.approx([each.at * 2 for each in fast])
    assert draw_arrivals(MIX, 2.0, 100.0, seed=4) != slow


def test_a_low_rate_lasts_until_there_is_something_to_judge():
    found = draw_arrivals(MIX, 0.01, 30.0, seed=0, least=15)
    assert len(found) == 15
    assert found == draw_arrivals(MIX, 0.01, found[-1].at + 1e-6, seed=0)


def test_requests_have_the_rate_and_the_sizes_that_are_asked_for():
    found = draw_arrivals(MIX, 5.0, 2000.0, seed=0)
    assert len(found) == pytest.approx(10_000, rel=0.05)
    prompts = sorted(each.prompt_tokens for each in found)
    assert prompts[0] >= 64 and prompts[-1] <= 2000
    assert prompts[len(prompts) // 2] == pytest.approx((64 * 2000) ** 0.5, rel=0.1)
    assert {each.output_tokens for each in found} == set(range(16, 201))


@pytest.mark.parametrize(
    ("line", "good"),
    [
        (timeline(first=4.0, gaps=(0.0799,)), True),
        (timeline(first=4.01), False),
        (timeline(gaps=(0.05, 0.09)), False),
        (timeline(error="HTTP 503"), False),
        (timeline(finish_reason=None), False),
        (unanswered(), False),
    ],
)
def test_a_request_is_good_if_all_its_tokens_came_in_time(line, good):
    assert OBJECTIVE.good(line) is good


def test_an_outcome_counts_what_never_came():
    outcome = judge(2.0, [timeline()] * 8 + [unanswered()] * 2, ended_at=30.0, objective=OBJECTIVE)
    assert outcome.good_share == 0.8 and outcome.unanswered == 2 and outcome.errors == []
    assert outcome.ttft_p50_seconds == pytest.approx(1.0)
    assert outcome.ttft_p90_seconds == pytest.approx(20.0), "waited in vain: the wait counts"
    assert outcome.gap_p99_seconds == pytest.approx(0.05)
    assert outcome.tokens_per_second == pytest.approx(8 * 103 / 20.0)


@pytest.mark.parametrize("carries", [0.07, 0.3, 0.5, 0.9, 1.7, 12.0])
def test_the_highest_rate_is_found_within_the_last_step(carries):
    search, tried = RateSearch(0.5, factor=1.5, halvings=3), []
    while (rate := search.next_rate) is not None:
        tried.append(rate)
        search.note(rate, passed=rate <= carries)
    assert carries / 1.5 ** (1 / 8) < search.found <= carries
    assert len(tried) == len(set(tried))


def test_a_cluster_that_carries_nothing_or_everything_ends_the_search():
    for passed in (False, True):
        search, tried = RateSearch(0.5), 0
        while (rate := search.next_rate) is not None:
            search.note(rate, passed=passed)
            tried += 1
        assert tried < 25
        assert (search.found > 600) is passed


def curve(name, *shares, goodput=0.0):
    def outcome(rate, share):
        lines = [timeline() if number < share * 10 else timeline(first=5.0) for number in range(10)]
        return judge(rate, lines, ended_at=30.0, objective=OBJECTIVE)

    return Curve(name, f"{name}.yaml", [], [outcome(1.0 + i, share) for i, share in enumerate(shares)], goodput)


def report(split, unified):
    return GoodputReport(
        setting=describe_setting(),
        conditions=Conditions(MIX, OBJECTIVE, 30.0, 0),
        curves=[curve("1P1D", 1.0, 0.9, goodput=split), curve("unified", 0.9, 0.5, goodput=unified)],
        tried=[curve("unified/64", 0.8)],
    )


def test_the_one_with_most_good_requests_is_chosen():
    assert rank([curve("a", 0.5), curve("b", 0.9), curve("c", 0.7)]) == 1


@pytest.mark.parametrize(
    ("split", "unified", "ratio", "verdict"),
    [(1.5, 1.0, "1.50", "met"), (1.4, 1.0, "1.40", "not met"), (1.0, 0.0, "-", "-")],
)
def test_the_report_says_whether_splitting_pays(split, unified, ratio, verdict):
    made = report(split, unified)
    lines = markdown(made.page, made.setting).splitlines()
    assert f"| goodput of 1P1D / that of unified | {ratio} | ≥ 1.50 | {verdict} |" in lines
    assert any(line.startswith("| unified | 2.00 | 10 | 50% | 50% |") for line in lines)
    assert msgspec.json.decode(msgspec.json.encode(made), type=GoodputReport) == made


def test_the_picture_tells_the_goodput_of_both(tmp_path):
    pytest.importorskip("matplotlib")
    draw(report(1.5, 1.0), tmp_path / "goodput.svg")
    text = (tmp_path / "goodput.svg").read_text()
    assert "1P1D: goodput 1.50 requests/s" in text and "unified: goodput 1.00 requests/s" in text

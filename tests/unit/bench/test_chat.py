"""Conversations: each prompt continues the one before, and it is known what of it is new."""

import msgspec
import pytest

from bench.chat.conversation import Conversation, Script, new_pages
from bench.chat.measure import Chat, Turn
from bench.chat.report import ChatReport
from bench.machine import describe_setting
from bench.report import markdown
from bench.statistics import Repeated
from bench.workload import Prompts

SCRIPT = Script(turns=3, first_tokens=32, new_tokens=10, answer_tokens=5)


def test_each_prompt_continues_what_was_said():
    conversation = Conversation(SCRIPT, Prompts(0, 1000), "chat-0")
    lengths, kept, before = [], [], []
    for _ in range(SCRIPT.turns):
        prompt = conversation.prompt()
        assert prompt[: len(before)] == before
        lengths.append(len(prompt))
        kept.append(conversation.kept_tokens)
        before = prompt + [7] * SCRIPT.answer_tokens
        conversation.answered(prompt, [7] * SCRIPT.answer_tokens)
    assert lengths == [32, 47, 62]
    assert kept == [0, 36, 51], "the last token of an answer has no KV"
    assert SCRIPT.longest == len(before) == 67


def test_conversations_have_nothing_in_common():
    first, second = (Conversation(SCRIPT, Prompts(0, 1000), name).prompt() for name in ("chat-0", "chat-1"))
    assert first[:4] != second[:4]


@pytest.mark.parametrize(("prompt", "kept", "pages"), [(32, 0, 2), (33, 0, 3), (47, 36, 1), (62, 47, 2), (64, 48, 1)])
def test_full_pages_need_not_be_sent_again(prompt, kept, pages):
    assert new_pages(prompt, kept, page_size=16) == pages


def chat(name, ttfts, sent):
    turns = [
        Turn(number, 100 * number, 50, Repeated(ttft, ttft, ttft), pages * 368_640, pages, 2)
        for number, (ttft, pages) in enumerate(zip(ttfts, sent, strict=True), 1)
    ]
    return Chat(name, "demo.yaml", [], turns)


def test_the_report_holds_turn_ten_against_turn_two_and_pages_against_new_ones():
    split = chat("1P1D", [0.5, 0.1, *[0.12] * 7, 0.16], [7] + [2] * 9)
    unified = chat("unified", [0.5, 0.1, *[0.12] * 7, 0.14], [0] * 10)
    report = ChatReport(describe_setting(), Script(), 3, 0, [split, unified])
    lines = markdown(report.page, report.setting).splitlines()
    assert "| 1P1D: TTFT of turn 10 / turn 2 | 1.60 | ≤ 1.50 | not met |" in lines
    assert "| unified: TTFT of turn 10 / turn 2 | 1.40 | ≤ 1.50 | met |" in lines
    assert "| 1P1D: pages sent / pages new to decode, turns 2 to 10 | 1.00 | ≤ 1.00 | met |" in lines
    assert not any("unified: pages" in line for line in lines)
    assert "| 2 | 200 | 50 | 100 | 0.74 | 2 | 2 |" in lines
    assert msgspec.json.decode(msgspec.json.encode(report), type=ChatReport) == report

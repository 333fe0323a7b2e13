"""What is said of conversations."""

from __future__ import annotations

import msgspec

from bench.chat.conversation import Script
from bench.chat.measure import Chat
from bench.machine import Setting
from bench.report import Page, Table, spread
from bench.targets import Target, at_most, targets_table

EARLIER, LATER = 2, 10
"""The turns that are compared."""


class ChatReport(msgspec.Struct, frozen=True, tag_field="kind", tag="chat"):
    """The same conversations with each contender."""

    setting: Setting
    script: Script
    conversations: int
    seed: int
    chats: list[Chat]

    @property
    def targets(self) -> list[Target]:
        ratios = [
            at_most(f"{chat.name}: TTFT of turn {LATER} / turn {EARLIER}", chat.ttft_ratio(LATER, EARLIER), 1.5)
            for chat in self.chats
        ]
        # Turns that hand nothing over have nothing to hand over twice.
        handed = [
            at_most(
                f"{chat.name}: pages sent / pages new to decode, turns 2 to {len(chat.turns)}",
                sum(turn.handed_pages for turn in chat.turns[1:]) / sum(turn.new_pages for turn in chat.turns[1:]),
                1.0,
            )
            for chat in self.chats
            if any(turn.handed_pages for turn in chat.turns) and len(chat.turns) > 1
        ]
        return [*ratios, *handed]

    @property
    def page(self) -> Page:
        tables = [*[_turns(chat) for chat in self.chats], targets_table(self.targets)]
        notes = [
            f"Medians of {self.conversations} conversations (least to most), one by one, after one to warm up.",
            "Cached: prompt tokens that were not computed again. New to decode: pages of the prompt less the full ones "
            "that it has from the turns before, answers included.",
        ]
        return Page("chat", f"Chat of {self.script.description}", tables, notes)


def _turns(chat: Chat) -> Table:
    hands_over = any(turn.handed_pages for turn in chat.turns)
    rows = [
        [
            str(turn.number),
            f"{turn.prompt_tokens:,}",
            f"{turn.cached_tokens:,}",
            spread(turn.ttft_seconds, 1e3),
            *([f"{turn.handed_bytes / 1e6:.2f}", str(turn.handed_pages), str(turn.new_pages)] if hands_over else []),
        ]
        for turn in chat.turns
    ]
    headers = ["turn", "prompt", "cached", "TTFT, ms"]
    return Table(chat.name, headers + (["handed over, MB", "pages", "new to decode"] if hands_over else []), rows)

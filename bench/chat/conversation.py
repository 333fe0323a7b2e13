"""What a conversation says in each of its turns, and what of it is new to the workers. Pure."""

from __future__ import annotations

import msgspec

from bench.workload import Prompts


class Script(msgspec.Struct, frozen=True):
    """Lengths, in tokens. After the first turn all turns are alike."""

    turns: int = 10
    first_tokens: int = 256
    """Of the first prompt."""
    new_tokens: int = 64
    """That each later turn adds to what was said before."""
    answer_tokens: int = 64

    @property
    def description(self) -> str:
        return (
            f"{self.turns} turns: a prompt of {self.first_tokens} tokens, then {self.new_tokens} new ones a turn; "
            f"answers of {self.answer_tokens}"
        )

    @property
    def longest(self) -> int:
        """Tokens of the whole conversation."""
        return self.first_tokens + (self.turns - 1) * self.new_tokens + self.turns * self.answer_tokens


class Conversation:
    """One user's. Ask `prompt`, tell `answered`, and so on."""

    def __init__(self, script: Script, prompts: Prompts, name: str) -> None:
        self._script = script
        self._prompts = prompts
        self._name = name
        self._said: list[int] = []
        self._turns = 0

    def prompt(self) -> list[int]:
        """All that was said so far, and what is new."""
        tokens = self._script.new_tokens if self._said else self._script.first_tokens
        return self._said + self._prompts.prompt(self._name, self._turns, tokens)

    @property
    def kept_tokens(self) -> int:
        """Tokens whose KV a decode worker has from the turns before: all but the last one, which nothing followed."""
        return max(0, len(self._said) - 1)

    def answered(self, prompt: list[int], answer: list[int]) -> None:
        self._said = prompt + answer
        self._turns += 1


def new_pages(prompt_tokens: int, kept_tokens: int, page_size: int) -> int:
    """Pages of the prompt that are not there already; kept ones are of use if they are full."""
    return -(-prompt_tokens // page_size) - kept_tokens // page_size

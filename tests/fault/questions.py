"""What the clients of a fault campaign ask: every way in which a request can be more than a plain one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.process.api import MODEL

SHORTEST_PROMPT, LONGEST_PROMPT = 8, 1400
FEWEST_TOKENS, MOST_TOKENS = 24, 72
TOPICS = ("the sea", "a red bicycle", "how bread is made", "the number seven", "a letter to a friend", "rain")
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 200, "min_p": 0.01}
STOPS = [" and", ".\n"]


class Question(NamedTuple):
    """One request, streamed. The same question has the same answer, at any time."""

    name: str
    path: str
    body: dict[str, Any]


def plan_questions(seed: int, count: int, corpus: Sequence[int]) -> list[Question]:
    """Questions 0 to `count` - 1 of a seed; `corpus` is where token prompts are cut from."""
    return [_question(random.Random(f"{seed}/{number}"), number, corpus) for number in range(count)]


def long_question(draw: random.Random, corpus: Sequence[int]) -> Question:
    """One whose prompt takes a while, for clients that leave meanwhile."""
    body = _completion(draw, corpus, LONGEST_PROMPT) | {"temperature": 0}
    return Question("long", "/v1/completions", body)


def _question(draw: random.Random, number: int, corpus: Sequence[int]) -> Question:
    length = round(SHORTEST_PROMPT * (LONGEST_PROMPT / SHORTEST_PROMPT) ** draw.random())
    seed = draw.randrange(2**31)
    sampled = {**SAMPLED, "seed": seed}
    kinds: dict[str, dict[str, Any]] = {
        "greedy": _completion(draw, corpus, length) | {"temperature": 0, "logprobs": 2},
        "sampled": _completion(draw, corpus, length) | sampled,
        "two": _completion(draw, corpus, length) | sampled | {"n": 2, "logprobs": 1},
        "stop": _completion(draw, corpus, length) | sampled | {"stop": STOPS, "ignore_eos": False},
        "chat": _chat(draw) | {"temperature": 0, "logprobs": True, "top_logprobs": 2},
        "chat-two": _chat(draw) | sampled | {"n": 2, "frequency_penalty": 0.5},
    }
    kind = list(kinds)[number % len(kinds)]
    path = "/v1/chat/completions" if kind.startswith("chat") else "/v1/completions"
    return Question(f"{kind}-{number}", path, kinds[kind])


def _completion(draw: random.Random, corpus: Sequence[int], length: int) -> dict[str, Any]:
    start = draw.randrange(len(corpus) - length)
    return _common(draw) | {"prompt": list(corpus[start : start + length])}


def _chat(draw: random.Random) -> dict[str, Any]:
    first, second = draw.sample(TOPICS, 2)
    content = f"Tell me a long story about {first} and {second}, in {draw.randint(3, 99)} sentences."
    return _common(draw) | {"messages": [{"role": "user", "content": content}]}


def _common(draw: random.Random) -> dict[str, Any]:
    return {
        "model": MODEL,
        "max_tokens": draw.randint(FEWEST_TOKENS, MOST_TOKENS),
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }

"""Holds conversations with a cluster, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import msgspec

from bench.alone import Alone, Asked
from bench.chat.conversation import Conversation, Script, new_pages
from bench.cluster import Cluster
from bench.contenders import Contender
from bench.records import Record
from bench.statistics import Repeated
from bench.workload import Prompts
from cluster.errors import LaunchError


class Turn(msgspec.Struct, frozen=True):
    """The same turn of all conversations; medians, unless said otherwise."""

    number: int
    """From 1."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, where it was prefilled."""
    ttft_seconds: Repeated
    handed_bytes: int
    handed_pages: int
    """From prefill to decode; 0 for unified clusters."""
    new_pages: int
    """What decode had not: as many have to be handed over at least."""


class Chat(msgspec.Struct, frozen=True):
    """One contender's."""

    name: str
    topology: str
    settings: list[str]
    turns: list[Turn]

    def ttft_ratio(self, later: int, earlier: int) -> float | None:
        """Of two turns' TTFT; None if the conversations were shorter."""
        seconds = {turn.number: turn.ttft_seconds.median for turn in self.turns}
        return seconds[later] / seconds[earlier] if {later, earlier} <= seconds.keys() else None


def measure_chat(
    contender: Contender, script: Script, conversations: int, seed: int, log_dir: Path, tell: Callable[[str], None]
) -> Chat:
    """One conversation more than is counted goes first. Raises `LaunchError`."""
    with Cluster(contender.topology, contender.settings, log_dir / contender.label) as cluster:
        alone = Alone(cluster)
        if script.longest > alone.context_length:
            raise LaunchError(f"{script.longest} tokens of conversation don't fit into {alone.context_length}")
        page_size = cluster.workers()[0].member.layout.page_size
        prompts = Prompts(seed, alone.vocab_size)
        held = [
            _converse(alone, Conversation(script, prompts, f"chat-{number}"), script, page_size)
            for number in range(conversations + 1)
        ]
    turns = [_summary(number, same) for number, same in enumerate(zip(*held[1:], strict=True), 1)]
    tell(f"{contender.name}: first token of the last turn after {turns[-1].ttft_seconds.median * 1e3:.0f} ms")
    return Chat(contender.name, contender.topology.name, list(contender.settings), turns)


class _Held(msgspec.Struct, frozen=True):
    """One turn of one conversation."""

    prompt_tokens: int
    new_pages: int
    ttft_seconds: float
    record: Record


def _converse(alone: Alone, conversation: Conversation, script: Script, page_size: int) -> list[_Held]:
    held = []
    for _ in range(script.turns):
        prompt = conversation.prompt()
        line, record = alone.ask_for_record(Asked(prompt, script.answer_tokens))
        wait = line.first_token_seconds
        if wait is None or len(line.token_ids) != script.answer_tokens:
            raise LaunchError(f"asked for {script.answer_tokens} tokens, told {len(line.token_ids)}")
        held.append(_Held(len(prompt), new_pages(len(prompt), conversation.kept_tokens, page_size), wait, record))
        conversation.answered(prompt, line.token_ids)
    return held


def _summary(number: int, held: Sequence[_Held]) -> Turn:
    prefills = [each.record.prefilled for each in held]
    handoffs = [each.record.handoff for each in held]
    return Turn(
        number=number,
        prompt_tokens=held[0].prompt_tokens,
        cached_tokens=round(median(each.cached_tokens if each else 0 for each in prefills)),
        ttft_seconds=Repeated.over([each.ttft_seconds for each in held]),
        handed_bytes=round(median(each.bytes if each else 0 for each in handoffs)),
        handed_pages=round(median(each.pages if each else 0 for each in handoffs)),
        new_pages=held[0].new_pages,
    )

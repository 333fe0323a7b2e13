"""The match: each contender is started, warmed up, measured at each level of concurrency and stopped, in turns."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from bench.client import CompletionClient, Timeline, open_session
from bench.load import SHORT, Observed
from bench.measure import Measurement, measure
from bench.peers.base import Card, Endpoint, Peer
from bench.peers.words import Words
from bench.processes import ProcessTree
from bench.statistics import Repeated, repeated
from bench.trial import Trial, play
from bench.workload import Prompts, Steady, Workload
from cluster.errors import LaunchError

MEMORY = "memory_gibibytes"
QUIET_SECONDS = 0.3
QUIET_SHARE = 0.1
SETTLE_SECONDS = 20.0
LEVELS_OF_A_SEED = 1000


class Standing(msgspec.Struct, frozen=True):
    """One contender at one level, over all rounds."""

    name: str
    streams: int
    rounds: list[Measurement]
    figures: dict[str, Repeated]
    """By `Figure.key`, and `MEMORY`."""


def level(streams: int, prompt_tokens: int, output_tokens: int, pace: float = 1.0) -> Workload:
    """`streams` clients, each with one request at a time. With more of them it takes longer until all are answered, and
    they are measured for longer; `pace` stretches both times."""
    return Workload(
        name=f"peers-{streams}",
        steady=Steady(streams=streams, prompt_tokens=prompt_tokens, output_tokens=output_tokens),
        long=None,
        warm_up_seconds=pace * (1 + streams / 6),
        seconds=pace * (5 + streams / 5),
    )


def run_match(
    peers: Sequence[Peer],
    levels: Sequence[Workload],
    words: Words,
    rounds: int,
    seed: int,
    log_dir: Path,
    tell: Callable[[str], None],
) -> list[Standing]:
    """In the order of `levels`, then of `peers`. Raises `LaunchError` if a contender does not start, or not answer."""
    found: dict[tuple[int, str], list[Measurement]] = {
        (each.steady.streams, peer.card.name): [] for each in levels for peer in peers
    }
    for number in range(rounds):
        # Every other round goes the other way: what drifts on the machine hits all alike.
        for peer in peers if number % 2 == 0 else peers[::-1]:
            card, begun = peer.card, time.monotonic()
            with peer.serve(log_dir / f"{card.name}-{number}") as endpoint:
                tell(f"round {number + 1} of {rounds}: {card.name} is up after {time.monotonic() - begun:.0f} s")
                measured = asyncio.run(_play_levels(card, endpoint, levels, words, seed + number, tell))
            for streams, measurement in measured.items():
                found[streams, card.name].append(measurement)
    return [_standing(name, streams, measured) for (streams, name), measured in found.items()]


def deviations(observed: Observed, steady: Steady) -> list[str]:
    """What makes a contender's work another than the others': how each request that ended was not `prompt_tokens` read
    afresh and `output_tokens` written, or as many as a stream's first answer has."""
    ended = [line for line in observed.timelines if line.ended_at is not None and line.error is None]
    if not ended:
        return ["no request was answered: nothing shows what its tokens are"]
    first = {steady.first_output_tokens(stream) for stream in range(steady.streams)}
    return [
        words
        for line in ended
        for words in _deviation(
            line, steady.prompt_tokens, {steady.output_tokens} if line.sent_at >= observed.start else first
        )
    ]


def _deviation(line: Timeline, prompt_tokens: int, output_tokens: set[int]) -> list[str]:
    usage = line.usage
    if usage is None:
        return ["a request ended without usage"]
    told = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, line.tokens)
    if told[:2] == (prompt_tokens, 0) and usage.completion_tokens == line.tokens and line.tokens in output_tokens:
        return []
    return ["a request read {} tokens, {} of them cached, and wrote {}, of which {} came".format(*told)]


async def _play_levels(
    card: Card,
    endpoint: Endpoint,
    levels: Sequence[Workload],
    words: Words,
    seed: int,
    tell: Callable[[str], None],
) -> Mapping[int, Measurement]:
    """One measurement for each level, by its streams."""
    found = {}
    # Some servers close connections that were kept, just when the next request goes out.
    async with open_session(keep_connections=False) as session:
        client = CompletionClient(
            session,
            endpoint.url,
            endpoint.model,
            endpoint.options,
            as_text=words.text if endpoint.takes_text else None,
            says_done=endpoint.says_done,
        )
        for workload in levels:
            streams = workload.steady.streams
            # The same prompts for all contenders, others at each level.
            prompts = Prompts(seed * LEVELS_OF_A_SEED + streams, words.vocab_size, ids=words.ids)
            await _first_answer(card, client, prompts, workload.steady)
            await _settle(endpoint.tree)
            found[streams] = _measured(await play(workload, client, prompts, endpoint.tree), workload.steady)
            tell(f"  {streams:>3} at a time: {_summary(found[streams])}")
    return found


async def _first_answer(card: Card, client: CompletionClient, prompts: Prompts, steady: Steady) -> None:
    """What a server does at its first request only is not to be measured. Raises `LaunchError` if it answers not."""
    prompt = prompts.prompt("first", 0, steady.prompt_tokens)
    timeline = Timeline(stream=SHORT, prompt_tokens=len(prompt), sent_at=time.monotonic())
    await client.stream(timeline, prompt, steady.output_tokens)
    if timeline.error is not None:
        raise LaunchError(f"{card.name} does not answer: {timeline.error}")


async def _settle(tree: ProcessTree) -> None:
    """Returns when the processes do next to nothing: what clients broke off before may still be computed. After
    `SETTLE_SECONDS` in any case, for servers that are never idle."""
    deadline = time.monotonic() + SETTLE_SECONDS
    spent = sum(tree.cpu_seconds().values())
    while time.monotonic() < deadline:
        await asyncio.sleep(QUIET_SECONDS)
        before, spent = spent, sum(tree.cpu_seconds().values())
        if spent - before < QUIET_SHARE * QUIET_SECONDS:
            return


def _measured(trial: Trial, steady: Steady) -> Measurement:
    found = measure(trial.observed, [], trial.cpu_seconds, trial.others_share)
    return msgspec.structs.replace(
        found,
        figures=found.figures | {MEMORY: trial.memory_bytes / 2**30},
        errors=found.errors + deviations(trial.observed, steady),
    )


def _standing(name: str, streams: int, rounds: list[Measurement]) -> Standing:
    keys = sorted({key for each in rounds for key in each.figures})
    return Standing(name, streams, rounds, repeated([each.figures for each in rounds], keys))


def _summary(found: Measurement) -> str:
    rate = found.figures["output_tokens_per_second"]
    errors = f" ({len(found.errors)} errors, the first: {found.errors[0]})" if found.errors else ""
    return f"{rate:.0f} tok/s, others {found.others_share:.0%}{errors}"

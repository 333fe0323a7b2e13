"""Baton beside the servers that a user might run instead."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer

from bench.commands.options import Cores, Out, Overrides, Seed, numbers, stay_on
from bench.commands.terminal import console, publish
from bench.contenders import REPOSITORY, RESULTS, Contender, named, split, unified_shapes
from bench.machine import describe_setting
from bench.peers.base import Peer, Place
from bench.peers.baton import Baton
from bench.peers.huggingface import huggingface
from bench.peers.llama import llama
from bench.peers.match import level, run_match
from bench.peers.match_report import MatchReport
from bench.peers.program import Program
from bench.peers.vllm import vllm
from bench.peers.words import words_of
from cluster.errors import ConfigError

PROGRAMS: Mapping[str, Callable[[Place, Sequence[str]], Program]] = MappingProxyType(
    {"vllm": vllm, "llama": llama, "transformers": huggingface}
)
BATON = "baton"
"""Stands for all clusters."""
SPARE = "2x1"
"""Takes part only if it is named, to save time."""


def peers_command(
    only: Annotated[
        str, typer.Option(help="1P1D, 1x2, 2x1, vllm, llama, transformers: some, with commas. `baton` is all clusters.")
    ] = "",
    topology: Annotated[list[Path] | None, typer.Option(help="Clusters that take part in place of ours.")] = None,
    settings: Overrides = None,
    arguments: Annotated[
        list[str] | None, typer.Option("--with", metavar="PEER=ARGUMENTS", help="Further arguments of a peer.")
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Clients with one request at a time each.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="How often each is started and measured.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 256,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    pace: Annotated[float, typer.Option(min=0.1, help="Below 1: shorter, and noisier.")] = 1.0,
    seed: Seed = 0,
    cores: Cores = "0,1",
    folder: Annotated[Path, typer.Option("--peers", help="What `make peers` has filled.")] = REPOSITORY / ".peers",
    out: Out = RESULTS,
) -> None:
    """Runs Baton and its peers in turns under the same load, on the same cores, and prints what each gave."""
    stay_on(cores)
    place = Place(folder.absolute())
    clusters = [named(each, settings or ()) for each in topology or ()] or _clusters(settings or ())
    peers = _contenders(only, clusters, place, _arguments(arguments or ()))
    for peer in peers:
        peer.check()
    words = words_of(place.huggingface_model / "tokenizer.json")
    levels = [level(each, prompt_tokens, output_tokens, pace) for each in numbers(concurrency, "--concurrency")]
    console.print(f"{rounds} rounds of " + ", ".join(peer.card.name for peer in peers))
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as logs:
        standings = run_match(peers, levels, words, rounds, seed, Path(logs), console.print)
    report = MatchReport(
        setting=describe_setting(),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        rounds=rounds,
        seed=seed,
        contenders=[peer.card for peer in peers],
        standings=standings,
    )
    publish(report, out)


def _clusters(settings: Sequence[str]) -> list[Contender]:
    """What two cores may be used for: a phase each, one worker with both, a worker each."""
    return [split(settings), *unified_shapes(settings)]


def _contenders(
    only: str, clusters: Sequence[Contender], place: Place, arguments: Mapping[str, Sequence[str]]
) -> list[Peer]:
    """Those that `only` names, or all but `SPARE`. A cluster goes by the last word of its name."""
    batons: dict[str, Peer] = {each.name.split()[-1]: Baton(each) for each in clusters}
    programs: dict[str, Peer] = {name: make(place, arguments.get(name, ())) for name, make in PROGRAMS.items()}
    known = batons | programs
    chosen = [word.strip() for word in only.split(",")] if only else [name for name in known if name != SPARE]
    if not set(chosen) <= {BATON, *known}:
        raise ConfigError(f"--only {only}: expected some of {', '.join([BATON, *known])}")
    return [peer for name, peer in known.items() if name in chosen or (BATON in chosen and name in batons)]


def _arguments(texts: Sequence[str]) -> dict[str, list[str]]:
    """From `llama=--poll 0` to llama's further arguments."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, equals, words = text.partition("=")
        if name not in PROGRAMS or not equals:
            raise ConfigError(f"--with {text}: expected PEER=ARGUMENTS, with one of {', '.join(PROGRAMS)}")
        found.setdefault(name, []).extend(shlex.split(words))
    return found

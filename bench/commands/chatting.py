"""Turn by turn."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench.chat.conversation import Script
from bench.chat.measure import measure_chat
from bench.chat.report import ChatReport
from bench.commands.options import Cores, Out, Overrides, Seed, stay_on
from bench.commands.terminal import console, publish
from bench.contenders import RESULTS, SPLIT, UNIFIED, named
from bench.machine import describe_setting


def chat_command(
    turns: Annotated[int, typer.Option(min=2)] = 10,
    first_tokens: Annotated[int, typer.Option(min=1, help="Of the first prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=1, help="That each later turn adds.")] = 64,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    conversations: Annotated[int, typer.Option(min=1, help="That are counted; one goes before.")] = 3,
    topology: Annotated[list[Path] | None, typer.Option(help="Default: 1P1D, and unified.")] = None,
    seed: Seed = 0,
    settings: Overrides = None,
    cores: Cores = "0,1",
    out: Out = RESULTS,
) -> None:
    """Holds conversations and shows, turn by turn: time to the first token, what was cached, what was handed over."""
    stay_on(cores)
    script = Script(turns, first_tokens, new_tokens, answer_tokens)
    console.print(f"{conversations} conversations of {script.description}")
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        chats = [
            measure_chat(named(each, settings or ()), script, conversations, seed, Path(folder), console.print)
            for each in topology or (SPLIT, UNIFIED)
        ]
    publish(ChatReport(describe_setting(), script, conversations, seed, chats), out)

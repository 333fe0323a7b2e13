"""What a unified cluster gives with each of its chunk sizes, so that the comparison is with the best of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from bench.compare import Result, measure_in_turns, steadiest
from bench.contenders import Contender, chunked
from bench.report import ABSENT, Table, spread
from bench.workload import Workload

SECONDS = 16.0
"""Length of a trial's window: eight long prompts of `mixed`."""

_COLUMNS = {
    "inter-token p99, ms": "inter_token_p99",
    "inter-token p50, ms": "inter_token_p50",
    "TTFT of long prompts p50, ms": "ttft_long_p50",
    "prompts and output, tok/s": "total_tokens_per_second",
}


class Tuned(msgspec.Struct, frozen=True):
    """The trials of one cluster, one for each chunk size, and the name of the best of them."""

    contender: str
    trials: list[Result]
    best: str


def tune(
    contender: Contender,
    chunks: Sequence[int],
    workload: Workload,
    seed: int,
    log_dir: Path,
    tell: Callable[[str], None],
) -> tuple[Contender, Tuned]:
    """Tries each chunk size once, with a shorter window; the contender with the best one, and all trials. The best is
    the `steadiest`. Raises `LaunchError`."""
    candidates = {each.name: each for each in (chunked(contender, tokens) for tokens in chunks)}
    shorter = msgspec.structs.replace(workload, seconds=min(SECONDS, workload.seconds))
    trials = measure_in_turns(list(candidates.values()), shorter, 1, seed, log_dir, tell)
    best = steadiest(trials).name
    return candidates[best], Tuned(contender.name, trials, best)


def tuning_table(tuned: Sequence[Tuned]) -> Table:
    rows = [
        [
            trial.name + (" *" if trial.name == each.best else ""),
            *[spread(trial.figures.get(key)) for key in _COLUMNS.values()],
            str(sum(len(one.errors) for one in trial.rounds)) if trial.rounds else ABSENT,
        ]
        for each in tuned
        for trial in each.trials
    ]
    return Table("Chunk sizes of unified clusters (* chosen)", ["", *_COLUMNS, "errors"], rows)

"""What a match says: a table for each level, who took part and how, and whether Baton keeps up with the best."""

from __future__ import annotations

import msgspec

from bench.machine import Setting
from bench.peers.base import Card
from bench.peers.match import MEMORY, Standing
from bench.report import Page, Table, number, spread
from bench.statistics import DEFINITION
from bench.targets import Target, at_least, targets_table

OUTPUT = "output_tokens_per_second"
COLUMNS = (
    (OUTPUT, "output"),
    ("ttft_short_p50", "TTFT p50"),
    ("ttft_short_p99", "p99"),
    ("inter_token_p50", "gap p50"),
    ("inter_token_p99", "p99"),
    ("cpu_per_thousand_tokens", "CPU"),
    (MEMORY, "memory"),
)
LEAST_ALONE = 0.9
LEAST_TOGETHER = 1.0
"""What Baton's output should be at least, as a share of the best peer's: with one client, and with more."""


class MatchReport(msgspec.Struct, frozen=True, tag_field="kind", tag="peers"):
    """Everything that is needed to judge, or to repeat, a match."""

    setting: Setting
    prompt_tokens: int
    output_tokens: int
    rounds: int
    seed: int
    contenders: list[Card]
    standings: list[Standing]
    percentiles: str = DEFINITION

    @property
    def levels(self) -> list[int]:
        return sorted({each.streams for each in self.standings})

    @property
    def errors(self) -> dict[str, int]:
        """By contender; those without are left out."""
        counts = {
            card.name: sum(
                len(each.errors)
                for standing in self.standings
                if standing.name == card.name
                for each in standing.rounds
            )
            for card in self.contenders
        }
        return {name: count for name, count in counts.items() if count}

    def at(self, streams: int) -> list[Standing]:
        """All contenders at one level, the fastest first."""
        return sorted(
            (each for each in self.standings if each.streams == streams), key=lambda each: -each.figures[OUTPUT].median
        )

    def ratio(self, standing: Standing) -> float | None:
        """Its output over that of the best peer at its level; None without peers."""
        peers = {card.name for card in self.contenders if not card.ours}
        best = max(
            (each.figures[OUTPUT].median for each in self.at(standing.streams) if each.name in peers), default=0.0
        )
        return standing.figures[OUTPUT].median / best if best else None

    @property
    def targets(self) -> list[Target]:
        ours = {card.name for card in self.contenders if card.ours}
        return [
            at_least(
                f"{each.name} / the best peer, {streams} at a time",
                self.ratio(each),
                LEAST_ALONE if streams == 1 else LEAST_TOGETHER,
            )
            for streams in self.levels
            for each in self.at(streams)
            if each.name in ours
        ]

    @property
    def page(self) -> Page:
        title = f"Baton beside its peers: {self.prompt_tokens}-token prompts, {self.output_tokens} tokens of output"
        return Page("peers", title, [*map(self._table, self.levels), targets_table(self.targets)], self._notes())

    def _table(self, streams: int) -> Table:
        return Table(
            f"{streams} at a time",
            ["", COLUMNS[0][1], "/ best", *[label for _, label in COLUMNS[1:]]],
            [
                [
                    standing.name,
                    spread(standing.figures.get(OUTPUT)),
                    number(self.ratio(standing)),
                    *[number(_median(standing, key)) for key, _ in COLUMNS[1:]],
                ]
                for standing in self.at(streams)
            ],
        )

    def _notes(self) -> list[str]:
        shares = [one.others_share for each in self.standings for one in each.rounds if one.others_share is not None]
        disturbed = [f"Other processes used up to {max(shares):.0%} of these cores."] if shares else []
        errors = ", ".join(f"{name}: {count}" for name, count in self.errors.items()) or "none"
        return [
            *disturbed,
            f"Medians of {self.rounds} rounds (least to most); all took turns on the same cores, with the load: same "
            "weights in bfloat16, same prompts (no two begin alike), all answers of full length.",
            "Output: tokens a second, while prompts are computed, too; beside it, the same over the best peer's.",
            "TTFT, and gap between two successive chunks that carry tokens: ms, at the client.",
            "CPU: seconds per 1,000 tokens of output. Memory: GiB, under load. Both of all processes of a contender.",
            f"Errors: {errors}.",
            f"Percentiles: {self.percentiles}.",
            *[f"- {_described(card)}" for card in self.contenders],
        ]


def _median(standing: Standing, key: str) -> float | None:
    found = standing.figures.get(key)
    return None if found is None else found.median


def _described(card: Card) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in card.versions.items())
    return f"{card.name}{f' ({versions})' if versions else ''}: `{card.command}`"

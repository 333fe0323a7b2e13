"""What a run of the campaigns found, as a result beside those of `bench`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from bench.report import ABSENT, Page, Table, number
from bench.statistics import DEFINITION, Spread
from tests.fault.answers import Verdict
from tests.fault.campaign import Strike
from tests.fault.crowd import Judged
from tests.fault.delays import Delay, by_kind
from tests.fault.plan import DEATHS, Kind, Moment

TARGET_SECONDS = 2.0
"""From a death to the next token, at the 99th percentile, the prefill of the request apart."""


class KindResult(msgspec.Struct, frozen=True):
    """One kind of fault. `noticed` has the delays of the choices that it interrupted, in seconds."""

    kind: str
    hits: dict[str, int]
    """Faults by the moment that they hit; under "any" those that were aimed at none, or missed it."""
    total: Spread | None
    without_prefill: Spread | None


class CampaignResult(msgspec.Struct, frozen=True):
    """One campaign: a cluster over one transfer engine."""

    transfer: str
    seconds: float
    faults: int
    streams: int
    requests: int
    tokens: int
    interrupted: int
    """Requests that needed another attempt or another connection."""
    verdicts: dict[str, int]
    kinds: list[KindResult]
    deaths_without_prefill: Spread | None
    """From the death of a worker or of its engine process to the next token, without the next attempt's prefill."""


def summarize(
    transfer: str,
    seconds: float,
    streams: int,
    judged: Sequence[Judged],
    interrupted: int,
    strikes: Sequence[Strike],
    delays: Sequence[Delay],
) -> CampaignResult:
    noticed = by_kind(delays)
    deaths = [delay.total - delay.prefill for kind in DEATHS for delay in noticed.get(kind, ())]
    counted = Counter(each.verdict.value for each in judged if each.verdict is not None)
    return CampaignResult(
        transfer=transfer,
        seconds=round(seconds, 1),
        faults=len(strikes),
        streams=streams,
        requests=len(judged),
        tokens=sum(each.reading.answer.tokens for each in judged),
        interrupted=interrupted,
        verdicts={verdict.value: counted[verdict.value] for verdict in Verdict},
        kinds=[_kind(kind, strikes, noticed.get(kind, ())) for kind in Kind],
        deaths_without_prefill=Spread.of(deaths),
    )


def _kind(kind: Kind, strikes: Sequence[Strike], noticed: Sequence[Delay]) -> KindResult:
    hits = Counter((each.hit or Moment.ANY).value for each in strikes if each.fault.kind is kind)
    return KindResult(
        kind=kind.value,
        hits=dict(hits),
        total=Spread.of([delay.total for delay in noticed]),
        without_prefill=Spread.of([delay.total - delay.prefill for delay in noticed]),
    )


def page(results: Sequence[CampaignResult]) -> Page:
    tables = [_requests(results), _hits(results)]
    tables += [_delays(result) for result in results]
    total = sum(result.faults for result in results)
    streams = results[0].streams
    title = f"{total} faults in a cluster of 2 prefill and 2 decode workers, {streams} streams, float32"
    notes = [
        "A request counts against us that fails, loses, repeats or changes a token, or its text, probabilities, finish "
        "reason or usage; all are compared with an undisturbed run.",
        "Faults of prefill workers, of decode workers, and of router and bootstrap happen side by side: a delay "
        "includes what the others add to it.",
        "Next token: at the client, after the fault, of each choice that it interrupted. Re-prefill: from the "
        "placement of that choice's next attempt to the token, queue included.",
        f"Percentiles: {DEFINITION}.",
    ]
    return Page("faults", title, tables, notes)


def _requests(results: Sequence[CampaignResult]) -> Table:
    rows: list[tuple[str, list[str]]] = [
        ("faults", [str(result.faults) for result in results]),
        ("seconds", [number(result.seconds) for result in results]),
        ("requests", [str(result.requests) for result in results]),
        ("tokens", [str(result.tokens) for result in results]),
        ("requests that were interrupted", [str(result.interrupted) for result in results]),
        *(
            (f"requests: {verdict.value}", [str(each.verdicts[verdict.value]) for each in results])
            for verdict in Verdict
        ),
        (
            f"death to next token without re-prefill, p50 / p99 in s (target: p99 < {TARGET_SECONDS:g})",
            [_spread(result.deaths_without_prefill) for result in results],
        ),
    ]
    return Table("Requests", ["", *(result.transfer for result in results)], [(name, *cells) for name, cells in rows])


def _hits(results: Sequence[CampaignResult]) -> Table:
    """Over all campaigns."""
    found: Counter[tuple[str, str]] = Counter()
    for result in results:
        for kind in result.kinds:
            found.update({(kind.kind, moment): count for moment, count in kind.hits.items()})
    moments = [moment.value for moment in Moment]
    rows = [(kind.value, *(str(found[kind.value, moment]) for moment in moments)) for kind in Kind]
    return Table("Faults, by where the request stood that they were aimed at", ["", *moments], rows)


def _delays(result: CampaignResult) -> Table:
    headers = ["", "choices", "next token, p50, s", "p99, s", "without re-prefill, p50, s", "p99, s"]
    rows = [
        (
            kind.kind,
            str(kind.total.count) if kind.total else "0",
            *_cells(kind.total),
            *(_cells(kind.without_prefill) if kind.kind != Kind.KILL_ROUTER.value else (ABSENT, ABSENT)),
        )
        for kind in result.kinds
    ]
    return Table(f"Fault to next token, {result.transfer}", headers, rows)


def _cells(spread: Spread | None) -> tuple[str, str]:
    return (ABSENT, ABSENT) if spread is None else (number(spread.p50), number(spread.p99))


def _spread(spread: Spread | None) -> str:
    return " / ".join(_cells(spread))

"""What is told of a campaign that went wrong: the requests concerned, and what happened meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tests.fault.campaign import Strike
from tests.fault.crowd import Judged
from tests.fault.watch import RequestRecord

BEFORE_SECONDS = 10.0
"""Faults so long before a request may still have a part in it."""
SHOWN = 5


def tell(failures: Sequence[Judged], records: dict[str, RequestRecord], strikes: Sequence[Strike], begun: float) -> str:
    """The first few; times are seconds since `begun`."""
    lines = [f"{len(failures)} requests went wrong"]
    for failure in failures[:SHOWN]:
        lines += ["", *_story(failure, records.get(failure.reading.name), strikes, begun)]
    return "\n".join(lines)


def _story(failure: Judged, record: RequestRecord | None, strikes: Sequence[Strike], begun: float) -> list[str]:
    reading = failure.reading
    verdict = failure.verdict.value if failure.verdict else "fine"
    ended = reading.ended_at or time.monotonic()
    events = [(reading.sent_at, "is sent"), *reading.notes]
    events += [
        (each.at, f"FAULT {each.fault}: {each.victim}, aimed at {each.reading}")
        for each in strikes
        if reading.sent_at - BEFORE_SECONDS <= each.at <= ended
    ]
    for index, choice in enumerate(record.choices if record else ()):
        for attempt in choice.history:
            placed = reading.sent_at + attempt.placed_seconds
            workers = f"{attempt.prefill_worker} and {attempt.decode_worker}"
            events.append((placed, f"choice {index} is placed on {workers}"))
            if attempt.ended_seconds is not None:
                why = f"{attempt.end}, {attempt.tokens} tokens; {attempt.error or 'no error'}; blame: {attempt.blame}"
                events.append((reading.sent_at + attempt.ended_seconds, f"choice {index}'s attempt ends: {why}"))
    told = [f"  {at - begun:8.3f}  {what}" for at, what in sorted(events)]
    return [f"{reading.name} ({reading.question.name}): {verdict}: {failure.reason}", *told]

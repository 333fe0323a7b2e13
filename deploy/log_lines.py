"""Reading the structured logs of our processes back for people. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

_HEAD = ("ts", "level", "process", "logger", "event", "exception")


def parse(line: str) -> dict[str, Any] | None:
    """The fields of a log line; None if it is not one of ours (a library's print, a traceback, half a line)."""
    try:
        fields: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError:
        return None
    return fields if "event" in fields else None


def readable(line: str) -> str:
    """A log line as text: time of day, level, event, fields, and a traceback below; any other line as it is."""
    fields = parse(line)
    if fields is None:
        return line
    clock = str(fields.get("ts", ""))[11:23]
    rest = "".join(f" {key}={value}" for key, value in fields.items() if key not in _HEAD)
    text = f"{clock} {fields.get('level', '')} {fields['event']}{rest}"
    return f"{text}\n{fields['exception']}" if "exception" in fields else text


def last_event(lines: Sequence[str]) -> str:
    """The name of the last event in these log lines; for a log of another form, its last line; empty for no lines."""
    for line in reversed(lines):
        fields = parse(line)
        if fields is not None:
            return str(fields["event"])
    return lines[-1].strip() if lines else ""


def last_error(lines: Iterable[str]) -> str | None:
    """What the process itself gave as the reason of its end: the last line's "error" field, if there is one."""
    errors = [fields["error"] for fields in map(parse, lines) if fields is not None and "error" in fields]
    return str(errors[-1]) if errors else None

"""Structured logs: an event's name and its fields, one JSON object per line on stderr (or plain text for terminals).

    log = get_logger(__name__)
    log.info("attempt started", request="req-1", worker="decode-0", pages=12)

`process` is the one that speaks, `worker` and `request` whom and what it speaks of. The standard library's logging
carries it, so that records of libraries come out in the same form (from "warning" on). A process calls `configure`
once, at its start; a module may make its logger at import.
"""

from __future__ import annotations

import logging
import sys
from datetime import datetime, timezone
from typing import Any, TextIO

import msgspec

from cluster.config import Logging

_ROOT = "baton"
_FIELDS = "baton_fields"
_OWN_KEYS = frozenset({"ts", "level", "process", "logger", "event", "exception"})

_encoder = msgspec.json.Encoder(enc_hook=str)


class Logger:
    """Writes events of one module. Calls are cheap when their level is off; usable from any thread."""

    def __init__(self, target: logging.Logger, bound: dict[str, Any]) -> None:
        self._target = target
        self._bound = bound

    def bind(self, **fields: Any) -> Logger:
        """A logger that adds `fields` to each event."""
        return Logger(self._target, {**self._bound, **fields})

    def debug(self, event: str, /, **fields: Any) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: Any) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        self._write(logging.ERROR, event, fields)

    def exception(self, event: str, /, **fields: Any) -> None:
        """An error with the traceback of the exception that is being handled."""
        self._write(logging.ERROR, event, fields, traceback=True)

    def _write(self, level: int, event: str, fields: dict[str, Any], *, traceback: bool = False) -> None:
        if self._target.isEnabledFor(level):
            self._target.log(level, "%s", event, exc_info=traceback, extra={_FIELDS: {**self._bound, **fields}})


def get_logger(name: str) -> Logger:
    """The logger of module `name`."""
    return Logger(logging.getLogger(f"{_ROOT}.{name}"), {})


def configure(process: str, config: Logging, stream: TextIO | None = None) -> None:
    """Sends the logs of this process, named `process`, to `stream` (stderr). A second call replaces the first."""
    root = logging.getLogger()
    # By name, because the handlers of others (a test runner's, for one) must stay.
    for former in [handler for handler in root.handlers if handler.name == _ROOT]:
        root.removeHandler(former)
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.set_name(_ROOT)
    handler.setFormatter(JsonFormatter(process) if config.json else TextFormatter(process))
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(_ROOT).setLevel(config.level.value.upper())


class JsonFormatter(logging.Formatter):
    """{"ts", "level", "process", "logger", "event", fields…} and, where there is one, "exception"."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": _time(record).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name.removeprefix(f"{_ROOT}."),
            "event": record.getMessage(),
        }
        for key, value in _fields(record).items():
            # A field never hides one of ours: whoever reads the logs relies on them.
            line[f"{key}_" if key in _OWN_KEYS else key] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encoder.encode(line).decode()


class TextFormatter(logging.Formatter):
    """`07:24:31.120 info prefill-0 attempt started request=req-1 pages=12`, a traceback below it."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        clock = _time(record).strftime("%H:%M:%S.%f")[:-3]
        fields = "".join(f" {key}={value}" for key, value in _fields(record).items())
        line = f"{clock} {record.levelname.lower()} {self._process} {record.getMessage()}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, tz=timezone.utc)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, _FIELDS, {})
    return fields

"""Logs are one JSON object per line, whoever wrote them."""

import io
import json
import logging

import pytest

from cluster.config import Dtype, Logging, LogLevel
from cluster.logging import configure, get_logger


@pytest.fixture
def stream():
    root, ours = logging.getLogger(), logging.getLogger("baton")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_line_with_its_fields(stream):
    configure("prefill-0", Logging(), stream)
    get_logger("engine.step").bind(worker="decode-0").info("attempt\nstarted 100%", request="r1", dtype=Dtype.FLOAT32)
    (line,) = lines(stream)
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "info",
        "process": "prefill-0",
        "logger": "engine.step",
        "event": "attempt\nstarted 100%",
        "worker": "decode-0",
        "request": "r1",
        "dtype": "float32",
    }


def test_a_field_never_hides_one_of_ours_and_any_value_can_be_logged(stream):
    configure("router", Logging(), stream)
    get_logger("x").warning("odd", level=3, error=ValueError("broken"), weird={1, 2})
    (line,) = lines(stream)
    assert (line["level"], line["level_"], line["error"]) == ("warning", 3, "broken")


def test_an_exception_stays_on_its_line(stream):
    configure("router", Logging(), stream)
    try:
        raise ValueError("broken")
    except ValueError:
        get_logger("x").exception("failed", request="r1")
    (line,) = lines(stream)
    assert line["level"] == "error" and line["request"] == "r1"
    assert "ValueError: broken" in line["exception"]


def test_libraries_come_out_in_the_same_form_from_warning_on(stream):
    configure("router", Logging(level=LogLevel.DEBUG), stream)
    logging.getLogger("aiohttp.access").info("chatter")
    logging.getLogger("aiohttp.server").error("bad %s", "request")
    get_logger("x").debug("detail")
    assert [(line["logger"], line["event"]) for line in lines(stream)] == [
        ("aiohttp.server", "bad request"),
        ("x", "detail"),
    ]


def test_plain_text_for_terminals_and_a_second_call_replaces_the_first(stream):
    configure("router", Logging(), stream)
    configure("router", Logging(level=LogLevel.WARNING, json=False), stream)
    get_logger("x").info("unheard")
    get_logger("x").warning("slow", seconds=1.5)
    assert stream.getvalue().split(" ", 1)[1] == "warning router slow seconds=1.5\n"

"""What people read: log lines, the pools, an answer as it comes."""

import io
import json

import msgspec
import pytest
from rich.console import Console

from cluster.errors import LaunchError
from deploy.cluster_client import Piece, base_url, parse_event
from deploy.log_lines import last_error, last_event, readable
from deploy.status import health, status_table
from tests.unit.deploy.example_members import member_status


def printed(table) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return [line.split() for line in console.file.getvalue().splitlines()]


def test_a_log_line_becomes_text_and_foreign_lines_stay():
    line = json.dumps(
        {"ts": "2026-11-20T07:31:40.543405Z", "level": "error", "event": "stopped", "error": "no", "n": 1}
    )
    assert readable(line) == "07:31:40.543 error stopped error=no n=1"
    assert readable('{"half": ') == '{"half": '
    assert readable("Segmentation fault") == "Segmentation fault"
    assert "\nTraceback" in readable(json.dumps({"event": "stopped", "exception": "Traceback\n  x"}))


def test_the_last_event_and_the_last_error_of_a_log():
    lines = ['{"event":"a","error":"first"}', '{"event":"b","error":"second"}', "a library's own line"]
    assert last_event(lines) == "b"
    assert last_error(lines) == "second"
    assert last_event(["no JSON at all"]) == "no JSON at all"
    assert (last_event([]), last_error([])) == ("", None)


def test_health_is_silence_before_readiness():
    assert health(member_status("prefill-0"), lease_seconds=3) == "ready"
    assert health(member_status("prefill-0", ready=False), lease_seconds=3) == "unready"
    assert health(member_status("prefill-0", ready=False, stalled="hangs"), lease_seconds=3) == "stalled"
    assert health(member_status("prefill-0", ready=False, age_seconds=3.1), lease_seconds=3) == "silent"


def test_the_pools_are_shown_prefill_first():
    rows = printed(status_table([member_status("decode-0", age_seconds=9), member_status("prefill-1")], 3.0))
    assert rows[1][:2] == ["prefill-1", "prefill"]
    assert rows[1][3:] == ["ready", "2", "1", "3/8", "1", "7", "0.5", "s", "ago"]
    assert rows[2][3] == "silent"


def test_ranks_have_a_column_where_there_are_several():
    whole, divided = member_status("prefill-0"), member_status("decode-0")
    layout = msgspec.structs.replace(divided.member.layout, shards=3, stages=2)
    divided = msgspec.structs.replace(divided, member=msgspec.structs.replace(divided.member, layout=layout))
    rows = printed(status_table([whole, divided], 3.0))
    assert rows[0][4] == "ranks"
    assert (rows[1][4], rows[2][4:8]) == ("1", ["2", "stages", "x", "3"])


def test_an_event_of_the_answers_stream():
    chunk = {"id": "r1", "choices": [{"delta": {"content": "Hi"}}]}
    assert parse_event(b"data: " + json.dumps(chunk).encode() + b"\n") == Piece("r1", "Hi")
    assert parse_event(b'data: {"id": "r1", "choices": [{"delta": {}}]}\n') == Piece("r1", "")
    assert parse_event(b'data: {"id": "r1", "choices": []}\n') == Piece("r1", "")
    for line in (b"\n", b": keep-alive\n", b"data: [DONE]\n"):
        assert parse_event(line) is None
    with pytest.raises(LaunchError, match="the router ended the answer: the worker died"):
        parse_event(b'data: {"error": {"message": "the worker died"}}\n')


def test_a_server_on_all_addresses_is_reached_on_this_machines_own():
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert base_url("::", 80) == "http://[::1]:80"
    assert base_url("example.org", 80) == "http://example.org:80"

"""What people read: log lines, the pools, where the time went."""

import io
import json

import pytest
from rich.console import Console

from cluster.errors import LaunchError
from cluster.messages import DecodeTimings, HandoffTimings, PrefillTimings
from deploy.cluster_client import Percentiles, Piece, RequestRecord, base_url, parse_event
from deploy.demo import timings_table
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
    assert health(member_status("prefill-0", ready=False, age_seconds=3.1), lease_seconds=3) == "silent"


def test_the_pools_are_shown_prefill_first():
    rows = printed(status_table([member_status("decode-0", age_seconds=9), member_status("prefill-1")], 3.0))
    assert rows[1][:2] == ["prefill-1", "prefill"]
    assert rows[1][3:] == ["ready", "2", "1", "3/8", "1", "7", "0.5", "s", "ago"]
    assert rows[2][3] == "silent"


def test_where_the_time_of_a_handed_over_request_went():
    record = RequestRecord(
        id="r1",
        prompt_tokens=110,
        output_tokens=40,
        total_seconds=2.0,
        queue_seconds=0.001,
        prefill=PrefillTimings(queue_seconds=0.001, compute_seconds=0.1, tokens=110, cached_tokens=10, chunks=1),
        handoff=HandoffTimings(0.002, write_seconds=0.002, exposed_seconds=0.003, pages=7, bytes=4_000_000),
        decode=DecodeTimings(0.1, 1.8, 39, 39),
        first_token_seconds=0.15,
        inter_token_seconds=Percentiles(p50=0.04, p99=0.06),
        prefill_worker="prefill-0",
        decode_worker="decode-0",
    )
    text = [" ".join(row) for row in printed(timings_table(record))]
    assert "prefill 100.0 ms 100 tokens, 1,000 tok/s, on prefill-0" in text
    assert "handoff 2.0 ms 7 pages, 4.00 MB, 2 GB/s, to decode-0" in text
    assert "exposed 3.0 ms last chunk computed until acknowledged" in text
    assert "inter-token 40.0 ms p50; p99 60.0 ms" in text
    assert "total 2000.0 ms 40 tokens, 20 tok/s" in text


def test_a_unified_request_has_no_handoff_and_its_prefill_is_the_decode_workers():
    prefill = PrefillTimings(0.0, compute_seconds=0.0, tokens=10, cached_tokens=10, chunks=0)
    record = RequestRecord("r1", 10, 1, 0.2, decode=DecodeTimings(0.1, 0.1, 1, 1, prefill), decode_worker="decode-0")
    text = [" ".join(row) for row in printed(timings_table(record))]
    assert "prefill 0.0 ms 0 tokens, on decode-0" in text
    assert not any(line.startswith("handoff") for line in text)


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

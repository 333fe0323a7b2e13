"""The waterfall of one request: its parts add up, each bar is where its time was."""

import io
import itertools

import msgspec
import pytest
from rich.console import Console

from cluster.timings import DecodeTimings, HandoffTimings, PrefillTimings
from deploy.cluster_client import AttemptRecord, FirstToken, Percentiles, RequestRecord
from deploy.explain import BAR_WIDTH, stages, waterfall

HANDED_OVER = RequestRecord(
    id="r1",
    prompt_tokens=110,
    output_tokens=40,
    total_seconds=2.0,
    queue_seconds=0.021,
    prefill=PrefillTimings(queue_seconds=0.02, compute_seconds=0.1, tokens=110, cached_tokens=10, chunks=2),
    handoff=HandoffTimings(
        grant_wait_seconds=0.002,
        write_seconds=0.002,
        exposed_seconds=0.003,
        pages=7,
        bytes=4_000_000,
        tail_seconds=0.001,
        skipped_pages=3,
        batches=2,
    ),
    decode=DecodeTimings(
        0.1, 1.8, 39, 78, batch_max=4, lease_seconds=0.0015, verify_seconds=0.0005, first_step_seconds=0.04
    ),
    first_token_seconds=0.15,
    first_token=FirstToken(router=0.025, tokenize=0.01, network=0.004, queue=0.02, prefill=0.1, rest=0.001),
    second_token_seconds=0.05,
    inter_token_seconds=Percentiles(p50=0.04, p99=0.06),
    prefill_worker="prefill-0",
    decode_worker="decode-0",
    finish_reason="length",
)
UNIFIED = RequestRecord(
    "r1",
    10,
    1,
    0.2,
    decode=DecodeTimings(0.1, 0.1, 1, 1, PrefillTimings(0.0, 0.0, tokens=10, cached_tokens=10, chunks=0)),
    first_token_seconds=0.1,
    decode_worker="decode-0",
    finish_reason="stop",
)


def printed(record) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    console.print(waterfall(record))
    return [" ".join(line.replace("█", "").replace("▏", "").split()) for line in console.file.getvalue().splitlines()]


def test_a_handed_over_request_is_told_stage_by_stage():
    lines = printed(HANDED_OVER)
    for expected in (
        "router 25.0 ms read, tokenized (10.0 ms), placed",
        "network 4.0 ms to prefill-0 and back",
        "queue 20.0 ms on prefill-0",
        "prefill 100.0 ms 100 tokens in 2 chunks, 10 cached, 1,000 tok/s, on prefill-0",
        "grant 2.0 ms pages of decode-0, 1.5 ms in its queue for them",
        "rest 1.0 ms the token's own way, beyond that of the first word",
        "first token 0.0 ms 150.0 ms after the request's arrival",
        "handoff 2.0 ms 7 pages, 4.00 MB in 2 batches, 2 GB/s, to decode-0; 3 more were there already",
        "exposed 3.0 ms last chunk computed until ACK, 3.0% of prefill",
        "pages 1.0 ms the last of them written",
        "messages 1.5 ms DONE there, ACK back",
        "verified 0.5 ms digests compared",
        "first step 40.0 ms the step under way awaited, then its own",
        "total 2000.0 ms 40 tokens, 20 tok/s, end: length",
    ):
        assert expected in lines
    (decode,) = [line for line in lines if line.startswith("decode ")]
    assert "39 steps, batch 2.0, at most 4; gaps 40.0 ms p50, 60.0 ms p99" in decode


def test_the_parts_until_the_first_token_add_up_to_it():
    by_name = {stage.name: stage for stage in stages(HANDED_OVER)}
    parts = [by_name[name] for name in ("router", "network", "queue", "prefill", "rest")]
    assert sum(part.seconds for part in parts) == pytest.approx(HANDED_OVER.first_token_seconds)
    for part, following in itertools.pairwise(parts):
        assert following.start == pytest.approx(part.start + part.seconds)


def test_a_bar_is_as_long_as_its_time_and_where_it_was():
    console = Console(file=io.StringIO(), width=200)
    console.print(waterfall(HANDED_OVER))
    (decode,) = [line for line in console.file.getvalue().splitlines() if line.startswith("decode ")]
    assert decode.count("█") == round(0.9 * BAR_WIDTH), "1.8 of 2.0 seconds"


def test_a_unified_request_has_no_handoff_and_its_prefill_is_the_decode_workers():
    lines = printed(UNIFIED)
    assert "prefill 0.0 ms 0 tokens in 0 chunks, 10 cached, on decode-0" in lines
    assert not any(line.startswith(("handoff", "exposed", "first step", "grant")) for line in lines)


def test_a_failed_request_says_how_it_ended_and_whose_fault_it_was():
    failed = msgspec.structs.replace(
        HANDED_OVER, handoff=None, decode=None, error="TransferFailed", blame="prefill", attempts=2
    )
    assert printed(failed)[-1].endswith("in 2 attempts, failed: TransferFailed, the prefill leg's fault")


def test_each_attempt_of_a_recovered_request_is_told():
    lost = AttemptRecord("prefill-0", "decode-0", 0.02, 0.9, 17, "worker_lost", "WorkerLost: it died", "decode-0")
    rest = AttemptRecord("prefill-0", "decode-1", 0.9, 2.0, 23, "length", None, None)
    record = msgspec.structs.replace(HANDED_OVER, attempts=2, history=[lost, rest])
    assert printed(record)[-3:] == [
        "attempt 880.0 ms 17 tokens on prefill-0 and decode-0, end: worker_lost by decode-0 (WorkerLost: it died)",
        "attempt 1100.0 ms 23 tokens on prefill-0 and decode-1, end: length",
        "total 2000.0 ms 40 tokens, 20 tok/s, in 2 attempts, end: length",
    ]
    assert not any(line.startswith("attempt") for line in printed(HANDED_OVER))


def test_a_request_that_was_refused_early_has_an_end_and_nothing_else():
    assert printed(RequestRecord("r1", 5, 0, 0.01, finish_reason="cancelled"))[-1].startswith("total 10.0 ms 0 tokens")

"""A request's record, from real workers: what was computed, sent and waited for."""

import subprocess
import sys

import pytest

from cluster.topology import load_topology
from tests.process.api import eventually
from tests.process.conftest import TOPOLOGIES

PAGE = 16
PAGE_BYTES = PAGE * 30 * 2 * 3 * 64 * 4
"""Tokens x layers x (key, value) x heads x head size x float32."""

CHUNK_TOKENS = load_topology(TOPOLOGIES / "demo.yaml").prefill.chunk_tokens


async def record_of(api, request):
    """Once both legs have had their last word."""
    found = {}

    async def whole():
        async with api.session.get(f"{api.url}/v1/requests/{request}") as response:
            found.update(await response.json())
        return found["handoff"] is not None and found["decode"] is not None

    await eventually(whole, "the record is whole")
    return found


def fresh(reference, start, length):
    """Tokens that no other test begins a prompt with."""
    corpus = reference.named("raw-2000").prompt
    return [corpus[-1 - start], *corpus[start : start + length - 1]]


async def test_the_record_of_a_handoff_adds_up(api, reference):
    answer = await api.stream(fresh(reference, 700, 600), max_tokens=8, temperature=0, ignore_eos=True)
    record = await record_of(api, answer.id)
    prefill, handoff, decode, first = (record[name] for name in ("prefill", "handoff", "decode", "first_token"))
    assert (prefill["tokens"], prefill["cached_tokens"], prefill["chunks"]) == (600, 0, -(-600 // CHUNK_TOKENS))
    assert (handoff["pages"], handoff["bytes"], handoff["skipped_pages"]) == (38, 38 * PAGE_BYTES, 0)
    assert handoff["batches"] >= 2, "the first chunk's pages went out while the second was computed"
    assert (decode["steps"], decode["batch_sum"], decode["batch_max"]) == (7, 7, 1)
    parts = [first[name] for name in ("router", "network", "queue", "prefill", "rest")]
    assert sum(parts) == pytest.approx(record["first_token_seconds"])
    assert all(part >= 0 for part in parts[:-1]) and abs(first["rest"]) < 0.1 * record["first_token_seconds"]
    assert 0 < handoff["tail_seconds"] + decode["verify_seconds"] < handoff["exposed_seconds"]
    assert handoff["exposed_seconds"] < prefill["compute_seconds"]
    assert 0 < decode["first_step_seconds"] < record["second_token_seconds"]


async def test_a_second_turn_sends_the_bytes_of_its_new_pages_only(api, reference):
    """What both sides have is neither computed nor sent, down to the page."""
    prompt = fresh(reference, 100, 320)
    first = await api.stream(prompt, max_tokens=33, temperature=0, ignore_eos=True)
    assert (await record_of(api, first.id))["handoff"]["bytes"] == 20 * PAGE_BYTES
    turn = [*prompt, *first.tokens, *fresh(reference, 500, 40)]
    second = await api.stream(turn, max_tokens=4, temperature=0, ignore_eos=True)
    record = await record_of(api, second.id)
    # Decode has KV of the prompt and of all but the last token of the answer: 352 tokens, 22 pages. Prefill has the
    # prompt's 20 pages, computes the answer again, and sends pages 23 and 24 and the half of the 25th.
    assert len(turn) == 393
    assert (record["prefill"]["cached_tokens"], record["handoff"]["skipped_pages"]) == (320, 22)
    assert (record["handoff"]["pages"], record["handoff"]["bytes"]) == (3, 3 * PAGE_BYTES)
    again = await api.stream(turn, max_tokens=4, temperature=0, ignore_eos=True)
    record = await record_of(api, again.id)
    assert again.tokens == second.tokens
    assert (record["handoff"]["pages"], record["handoff"]["bytes"]) == (1, PAGE_BYTES), "the last page is never whole"


def explain(*words):
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", "explain", *words], capture_output=True, text=True, timeout=60
    )


async def test_explain_shows_the_request_and_names_one_that_is_not_known(api, reference):
    answer = await api.stream(fresh(reference, 900, 40), max_tokens=4, temperature=0)
    await record_of(api, answer.id)
    shown = explain(answer.id, "--router", api.url)
    assert shown.returncode == 0, shown.stderr
    stages = [line.split()[0] for line in shown.stdout.splitlines()]
    assert stages[1:5] == ["router", "network", "queue", "prefill"] and stages[-1] == "total"
    unknown = explain("cmpl-nobody", "--router", api.url)
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith("error: the router at ") and "'cmpl-nobody'" in unknown.stderr

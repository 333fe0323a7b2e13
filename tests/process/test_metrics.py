"""Each process's `/metrics`, as Prometheus sees it, after real work."""

import asyncio
import shutil

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.cluster import get

PROMTOOL = shutil.which("promtool")


@pytest.fixture
async def expositions(demo_cluster, api, reference):
    """The text of every process, by name."""
    case = reference.named("raw-100")
    await api.stream(case.prompt, max_tokens=8, temperature=0)
    demo_cluster.wait_idle()
    urls = {"router": demo_cluster.url, "bootstrap": demo_cluster.bootstrap_url}
    urls |= {status.member.worker: status.member.url for status in demo_cluster.workers()}
    return {name: get(f"{url}/metrics") for name, url in urls.items()}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not here: it comes with Debian's package prometheus")
async def test_promtool_finds_nothing_to_say(expositions):
    assert len(expositions) == 4
    for name, text in expositions.items():
        process = await asyncio.create_subprocess_exec(
            PROMTOOL, "check", "metrics", stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        _, said = await process.communicate(text)
        assert (process.returncode, said) == (0, b""), f"{name}: {said.decode()}"


async def test_the_work_is_counted_where_it_was_done(expositions):
    counted = {
        (name, sample.name): sample.value
        for name, text in expositions.items()
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.value and not sample.name.endswith("_created")
    }
    assert counted["prefill-0", "baton_prefill_tokens_total"] >= 100
    assert counted["prefill-0", "baton_handoff_bytes_total"] >= 100 * 30 * 2 * 3 * 64 * 4
    assert counted["decode-0", "baton_output_tokens_total"] >= 7
    assert counted["router", "baton_time_to_first_token_seconds_count"] >= 1
    assert counted["router", "baton_inter_token_latency_seconds_count"] >= 7
    assert counted["router", "baton_workers"] == 1
    assert ("decode-0", "baton_kv_pages_used") not in counted, "an idle worker uses no page"
    assert ("decode-0", "baton_kv_committed_ratio") not in counted

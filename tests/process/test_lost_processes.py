"""Processes that die, restart or do not fit together: who notices, how soon, and what is left."""

import asyncio
import time

import pytest

from tests.process.api import Api, StreamError, eventually

AT_ONCE_SECONDS = 3.0
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
async def cluster(processes, http):
    """1P2D, each process on its own."""
    for name in ("bootstrap", "prefill-0", "decode-0", "decode-1", "router"):
        processes.start(name)
    processes.wait_workers("prefill-0", "decode-0", "decode-1")
    processes.wait_healthy()
    return processes


async def all_idle(processes):
    async def idle():
        return processes.workers().idle

    await eventually(idle, "all ledgers of the living are at zero")


async def test_lost_workers_end_their_requests_and_nobody_elses(cluster, http, reference):
    """A decode worker in the middle of a stream; then a prefill worker's engine in the middle of a prompt."""
    api = Api(http, cluster.url)
    prompt = reference.named("raw-50").prompt

    async def read_forever(first_chunk):
        async with api.open_stream(prompt, max_tokens=4000, ignore_eos=True) as chunks:
            async for chunk in chunks:
                if not first_chunk.done():
                    first_chunk.set_result(chunk["id"])

    started = [asyncio.get_running_loop().create_future() for _ in range(2)]
    readers = [asyncio.create_task(read_forever(each)) for each in started]
    ids = await asyncio.gather(*started)
    homes = [await decode_worker_of(api, each) for each in ids]
    assert sorted(homes) == ["decode-0", "decode-1"], "least load gives each of two idle workers one"
    victim, survivor = readers
    begun = time.monotonic()
    cluster.kill(homes[0])
    with pytest.raises(StreamError, match=homes[0]):
        await victim
    assert time.monotonic() - begun < AT_ONCE_SECONDS
    assert not survivor.done()
    survivor.cancel()
    await asyncio.gather(survivor, return_exceptions=True)
    cluster.wait_workers("prefill-0", homes[1])
    await all_idle(cluster)
    assert len((await api.stream(prompt, max_tokens=4, ignore_eos=True)).tokens) == 4

    long = asyncio.create_task(api.stream(reference.named("raw-2000").prompt * 3, max_tokens=8))

    async def computing():
        return any(status.load.running for status in cluster.workers().workers if status.member.role == "prefill")

    await eventually(computing, "the prompt is being computed")
    begun = time.monotonic()
    cluster.kill_engine("prefill-0")
    with pytest.raises(StreamError, match="prefill-0"):
        await long
    assert time.monotonic() - begun < AT_ONCE_SECONDS
    await all_idle(cluster)


async def decode_worker_of(api, request):
    async with api.session.get(f"{api.url}/v1/requests/{request}") as response:
        return (await response.json())["decode_worker"]


async def test_nobody_notices_that_bootstrap_restarts(cluster, http, reference):
    api = Api(http, cluster.url)
    prompt = reference.named("raw-50").prompt
    expected = await api.stream(prompt, max_tokens=200, temperature=0, ignore_eos=True)
    tokens = []
    async with api.open_stream(prompt, max_tokens=200, temperature=0, ignore_eos=True) as chunks:
        async for chunk in chunks:
            tokens += [token for choice in chunk["choices"] for token in choice["token_ids"]]
            if len(tokens) == 3:
                cluster.kill("bootstrap")
            if len(tokens) == 20:
                # Without bootstrap, new requests are served too.
                assert len((await api.stream(prompt, max_tokens=4, ignore_eos=True)).tokens) == 4
                cluster.start("bootstrap")
    assert tokens == expected.tokens
    cluster.wait_workers("prefill-0", "decode-0", "decode-1")
    await all_idle(cluster)
    assert len((await api.stream(prompt, max_tokens=4, ignore_eos=True)).tokens) == 4


async def test_workers_of_different_layouts_refuse_each_other(processes, http):
    for name, *settings in (["bootstrap"], ["prefill-0"], ["decode-0", "kv.page_size=32"], ["router"]):
        processes.start(name, *settings)
    processes.wait_workers("prefill-0", "decode-0")
    line = processes.wait_log("prefill-0", "layouts differ")
    assert "page_size: 16 != 32" in line or "page_size: 32 != 16" in line
    assert line.count("'kv_heads': 3") == 2, "both layouts are in the error"
    body = {"model": "smollm2-135m-instruct", "prompt": "hello", "max_tokens": 4}
    async with http.post(f"{processes.url}/v1/completions", json=body) as response:
        assert response.status == 503
        assert response.headers["Retry-After"]
        assert "layout" in (await response.json())["error"]["message"]


async def test_each_process_ends_in_peace_on_sigterm(cluster):
    assert {name: cluster.terminate(name) for name in ("router", "decode-1", "decode-0", "prefill-0", "bootstrap")} == {
        "router": 0,
        "decode-1": 0,
        "decode-0": 0,
        "prefill-0": 0,
        "bootstrap": 0,
    }

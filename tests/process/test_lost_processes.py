"""Processes that die, restart or do not fit in: who notices, how soon, and what is left.

The tests share one cluster, 1P2D, each process started by itself; each finds it complete.
"""

import asyncio

import pytest

from tests.process.api import Api, eventually
from tests.process.conftest import TOPOLOGIES
from tests.process.processes import Processes
from tests.process.reader import Reader

WORKERS = ("prefill-0", "decode-0", "decode-1")
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    logs = tmp_path_factory.mktemp("processes")
    found = Processes(TOPOLOGIES / "1p3d.yaml", logs, ("kv.pool_tokens=8192",))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(autouse=True)
def complete(cluster):
    """An earlier test may have failed with a process down."""
    for name in ("bootstrap", *WORKERS, "router"):
        if not cluster.running(name):
            cluster.start(name)
    cluster.wait_workers(*WORKERS)
    cluster.wait_healthy()


@pytest.fixture
def api(http, cluster):
    return Api(http, cluster.url)


@pytest.fixture
def prompt(reference):
    return reference.named("raw-50").prompt


async def all_idle(cluster):
    async def idle():
        return cluster.workers().idle

    await eventually(idle, "all ledgers of the living are at zero")


async def serves(api, prompt):
    assert len((await api.stream(prompt, max_tokens=4, ignore_eos=True)).tokens) == 4


async def test_nobody_notices_that_bootstrap_restarts(cluster, api, prompt):
    expected = await api.stream(prompt, max_tokens=100, temperature=0, ignore_eos=True)
    tokens = []
    async with api.open_stream(prompt, max_tokens=100, temperature=0, ignore_eos=True) as chunks:
        async for chunk in chunks:
            tokens += [token for choice in chunk["choices"] for token in choice["token_ids"]]
            if len(tokens) == 3:
                cluster.kill("bootstrap")
            if len(tokens) == 20:
                await serves(api, prompt)  # there is no bootstrap now
                cluster.start("bootstrap")
    assert tokens == expected.tokens
    cluster.wait_workers(*WORKERS)
    await all_idle(cluster)
    await serves(api, prompt)


async def test_a_worker_of_another_layout_is_refused_and_gets_no_work(cluster, api, prompt):
    cluster.start("decode-2", "kv.page_size=32")
    cluster.wait_workers(*WORKERS, "decode-2")
    line = cluster.wait_log("prefill-0", "layouts differ")
    assert "page_size: 16 != 32" in line or "page_size: 32 != 16" in line
    assert line.count("'kv_heads': 3") == 2, "both layouts are in the error"
    readers = [Reader(api, prompt) for _ in range(4)]
    assert {await reader.decode_worker() for reader in readers} == {"decode-0", "decode-1"}
    await asyncio.gather(*(reader.leave() for reader in readers))
    assert cluster.terminate("decode-2") == 0
    cluster.wait_workers(*WORKERS)
    await all_idle(cluster)


LONG_ENOUGH = [
    {"max_tokens": 90, "temperature": 0},
    {"max_tokens": 90, "temperature": 0.9, "seed": 7, "presence_penalty": 0.5},
]
"""To be in the middle of when something dies: one greedy, one sampled."""


async def test_streams_of_a_dead_decode_worker_go_on_elsewhere_with_the_same_tokens(cluster, api, prompt):
    expected = [(await api.stream(prompt, ignore_eos=True, **parameters)).tokens for parameters in LONG_ENOUGH]
    readers = [Reader(api, prompt, **parameters) for parameters in LONG_ENOUGH]
    homes = [await reader.decode_worker() for reader in readers]
    assert sorted(homes) == ["decode-0", "decode-1"], "least load gives each of two idle workers one"
    cluster.kill(homes[1])
    await asyncio.gather(*(reader.task for reader in readers))
    assert [reader.tokens for reader in readers] == expected
    assert [await reader.decode_worker() for reader in readers] == [homes[0]] * 2
    cluster.wait_workers("prefill-0", homes[0])
    await all_idle(cluster)
    await its_successor_serves(cluster, api, prompt, homes[1])


async def test_a_dead_engine_process_is_replaced_and_what_decode_had_granted_comes_back(
    cluster, api, prompt, reference
):
    before = cluster.epoch("prefill-0")
    long = asyncio.create_task(api.stream(reference.named("raw-2000").prompt * 3, max_tokens=8))

    async def granted():
        loads = [status.load for status in cluster.workers().workers if status.member.role == "decode"]
        return any(load.owners.get("lease") for load in loads)

    await eventually(granted, "decode has granted pages")
    cluster.engine("prefill-0").kill()
    assert len((await long).tokens) == 8, "it waited for the only prefill worker to be back"

    async def replaced():
        return (cluster.epoch("prefill-0") or 0) > before

    await eventually(replaced, "the worker is back with another engine process")
    assert cluster.running("prefill-0")
    await all_idle(cluster)
    await it_serves(cluster, api, prompt, "prefill-0")


async def test_a_stopped_engine_process_makes_its_worker_unready_until_it_goes_on(cluster, api, prompt):
    expected = (await api.stream(prompt, ignore_eos=True, **LONG_ENOUGH[1])).tokens
    reader = Reader(api, prompt, **LONG_ENOUGH[1])
    stopped = await reader.decode_worker()
    before = cluster.epoch(stopped)
    cluster.engine(stopped).suspend()

    async def is_out():
        return cluster.epoch(stopped) is None

    try:
        await eventually(is_out, "its heartbeats say that it is not ready")
        (stalled,) = [status.load for status in cluster.workers().workers if status.load.stalled]
        assert "has made no progress for" in stalled.stalled
        await reader.task
        assert reader.tokens == expected, "its stream goes on elsewhere, with the same tokens"
        readers = [Reader(api, prompt) for _ in range(2)]
        assert {await reader.decode_worker() for reader in readers} == {"decode-0", "decode-1"} - {stopped}
        await asyncio.gather(*(reader.leave() for reader in readers))
    finally:
        cluster.engine(stopped).resume()

    async def is_back():
        return cluster.epoch(stopped) == before

    await eventually(is_back, "the same engine process is ready again")
    await it_serves(cluster, api, prompt, stopped)


async def its_successor_serves(cluster, api, prompt, name):
    cluster.start(name)
    cluster.wait_workers(*WORKERS)
    cluster.wait_healthy()
    await it_serves(cluster, api, prompt, name)


async def it_serves(cluster, api, prompt, name):
    """The same name with a new epoch is a new worker: it is given work, and it is found by its peers."""

    async def takes_part():
        readers = [Reader(api, prompt), Reader(api, prompt)]
        homes = {await reader.decode_worker() for reader in readers}
        await asyncio.gather(*(reader.leave() for reader in readers))
        return homes == {"decode-0", "decode-1"}

    await eventually(takes_part, f"requests go through the new {name} too")
    await all_idle(cluster)


async def test_each_process_ends_in_peace_on_sigterm(cluster):
    order = ("router", "decode-1", "decode-0", "prefill-0", "bootstrap")
    assert {name: cluster.terminate(name) for name in order} == dict.fromkeys(order, 0)

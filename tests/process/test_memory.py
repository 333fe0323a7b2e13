"""Work leaves nothing behind: no page, no slot, no memory, whenever its clients went away."""

import asyncio
import json

import pytest

from bench.cluster import Cluster
from tests.process.api import Api
from tests.process.conftest import TOPOLOGIES
from tests.process.visitors import moments_of_leaving, plan_visit, play_all

GROWTH = 1.05
GROWTH_OF_A_SOAK = 1.02
"""After a quarter of it: 0.4% were seen."""
CONCURRENT = 24
SEED = 20_261_120
VISITS = {"nixl": 2000, "mooncake": 500}
WARM_UP = 0.25
"""The share of the visits after which memory is looked at for the first time."""
AT_ONCE = 12
LEAST_AT_EACH_MOMENT = 5
SMALL_POOL = "kv.pool_tokens=12288"
"""So small that requests wait for pages, and that all of it is in use when memory is first looked at."""


async def serve(api, reference, requests):
    """So many short requests; prompts repeat, as those of real applications do."""
    corpus, turn = reference.named("raw-2000").prompt, asyncio.Semaphore(CONCURRENT)

    async def one(number):
        async with turn:
            prompt = corpus[number % 1000 : number % 1000 + 2 + number % 30]
            found = await api.stream(prompt, max_tokens=1 + number % 6, temperature=0, ignore_eos=True)
            assert len(found.tokens) == 1 + number % 6

    await asyncio.gather(*(one(number) for number in range(requests)))


def assert_no_growth(before, after, most=GROWTH):
    assert after.keys() == before.keys(), "a process was replaced"
    grown = {name: round(after[name] / before[name], 4) for name in before}
    print(f"resident memory, after / before: {grown}")
    assert all(ratio < most for ratio in grown.values()), grown


@pytest.mark.timeout(300)
async def test_hundreds_of_requests_leave_nothing_behind(api, demo_cluster, reference):
    await serve(api, reference, 150)
    demo_cluster.wait_idle()
    before = demo_cluster.tree.resident_bytes()
    await serve(api, reference, 250)
    demo_cluster.wait_idle()
    assert_no_growth(before, demo_cluster.tree.resident_bytes())


@pytest.fixture(scope="module", params=VISITS)
def transfer(request):
    return request.param


@pytest.fixture(scope="module")
def visited_cluster(transfer, tmp_path_factory):
    settings = (SMALL_POOL, f"kv.transfer={transfer}")
    with Cluster(TOPOLOGIES / "demo.yaml", settings, tmp_path_factory.mktemp(transfer)) as cluster:
        yield cluster


@pytest.mark.soak
@pytest.mark.timeout(900)
async def test_clients_that_leave_at_any_moment_leave_nothing_behind(transfer, visited_cluster, http, reference):
    api, corpus = Api(http, visited_cluster.url), reference.named("raw-2000").prompt
    visits = [plan_visit(SEED, number, corpus) for number in range(VISITS[transfer])]
    cut = int(len(visits) * WARM_UP)
    await play_all(api, visits[:cut], AT_ONCE)
    visited_cluster.wait_idle()
    before = visited_cluster.tree.resident_bytes()
    await play_all(api, visits[cut:], AT_ONCE)
    visited_cluster.wait_idle()
    assert_no_growth(before, visited_cluster.tree.resident_bytes(), GROWTH_OF_A_SOAK)
    moments = await moments_of_leaving(api, visits)
    print(f"{len(visits)} visits; left: {dict(moments)}")
    assert set(moments) == {"before placement", "queue", "prefill", "handoff", "decode"}
    assert min(moments.values()) >= LEAST_AT_EACH_MOMENT, moments
    async with http.get(f"{visited_cluster.url}/status") as response:
        status = await response.json()
    assert (status["in_flight"], status["integrity_errors"]) == (0, [])
    assert all(worker["live"] and worker["attempts"] == 0 for worker in status["workers"]), status
    assert not errors_in(visited_cluster.log_dir)


def errors_in(folder):
    """What the processes logged as errors: a client that leaves is none."""
    lines = [line for path in folder.glob("*.log") for line in path.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if json.loads(line)["level"] == "error"]

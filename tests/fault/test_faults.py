"""Any process may die, stall or be cut off at any moment, and every client gets its tokens, each once, in order."""

import time

import pytest

from bench.cluster import Cluster
from tests.fault.campaign import Campaign, NotWhole
from tests.fault.crowd import Crowd, ask_in_peace
from tests.fault.delays import delays
from tests.fault.plan import plan_faults
from tests.fault.questions import plan_questions
from tests.fault.results import summarize
from tests.fault.story import tell
from tests.fault.watch import RouterOutage, Watch
from tests.process.conftest import TOPOLOGIES

STREAMS = 16
QUESTIONS = 48
REST_SECONDS = 60.0
SETTINGS = (
    "model.dtype=float32",
    "kv.pool_tokens=8192",  # so small that it is in use, and that prompts leave the prefix cache
    "restarts.most=10000",
    "restarts.longest_pause_seconds=0.5",
)
pytestmark = [pytest.mark.fault, pytest.mark.timeout(1500)]


@pytest.fixture(params=["nixl", "mooncake"])
def transfer(request):
    return request.param


@pytest.fixture
def cluster(transfer, tmp_path):
    with Cluster(TOPOLOGIES / "2p2d.yaml", (*SETTINGS, f"kv.transfer={transfer}"), tmp_path) as started:
        yield started


async def test_no_client_notices_a_fault(
    transfer, cluster, http, reference, answers, fault_seed, fault_count, fault_kinds, results
):
    corpus = reference.named("raw-2000").prompt
    questions = plan_questions(fault_seed, QUESTIONS, corpus)
    if not answers:
        answers.update(await ask_in_peace(http, cluster.url, questions, STREAMS))
    outage, watch = RouterOutage(), Watch(http, cluster.url, cluster.bootstrap_url)
    crowd = Crowd(http, cluster.url, questions, answers, outage, fault_seed)
    campaign = Campaign(cluster, http, crowd, outage, watch, corpus, print)
    not_whole = None
    async with crowd.of(STREAMS):
        try:
            await campaign.play(plan_faults(fault_seed, fault_count, fault_kinds), fault_seed)
        except NotWhole as error:
            not_whole = error
    seconds = time.monotonic() - crowd.begun
    records = await watch.records(each.reading for each in crowd.judged)
    noticed = [
        delay
        for each in crowd.judged
        for delay in delays(each.reading, records.get(each.reading.name), campaign.strikes)
    ]
    interrupted = sum(was_interrupted(each.reading, records.get(each.reading.name)) for each in crowd.judged)
    results.append(summarize(transfer, seconds, STREAMS, crowd.judged, interrupted, campaign.strikes, noticed))
    assert not crowd.failures, tell(crowd.failures, records, campaign.strikes, crowd.begun)
    assert not_whole is None, not_whole
    assert len(campaign.strikes) == fault_count
    cluster.wait_idle(REST_SECONDS)
    status = await watch.status()
    assert status is not None and status.at_rest, status
    assert not defects(cluster.log_dir)


def was_interrupted(reading, record):
    return reading.connections > 1 or (record is not None and any(len(choice.history) > 1 for choice in record.choices))


def defects(folder):
    """What nobody expects, whatever happens to processes."""
    words = ("Traceback", "IllegalTransition", "Task exception was never retrieved")
    return [
        f"{path.name}: {line}"
        for path in folder.glob("*.log")
        for line in path.read_text(errors="replace").splitlines()
        if any(word in line for word in words)
    ]

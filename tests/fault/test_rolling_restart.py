"""Every worker is replaced while clients read, and none of them notices."""

import asyncio
import sys

import pytest

from bench.cluster import Cluster
from tests.fault.crowd import Crowd, ask_in_peace
from tests.fault.questions import plan_questions
from tests.fault.story import tell
from tests.fault.watch import NO_OUTAGE, Watch
from tests.process.conftest import TOPOLOGIES

STREAMS = 8
QUESTIONS = 24
SETTINGS = ("model.dtype=float32", "kv.pool_tokens=8192")
SHORT_GRACE = "worker.drain_seconds=2"
"""Shorter than answers take: what is not finished by then goes on elsewhere."""
pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=[(), (SHORT_GRACE,)], ids=["finishing", "moving"])
def cluster(request, tmp_path_factory):
    with Cluster(TOPOLOGIES / "2p2d.yaml", (*SETTINGS, *request.param), tmp_path_factory.mktemp("rolling")) as started:
        yield started


async def test_a_rolling_restart_of_all_workers_loses_nothing(cluster, http, reference, fault_seed):
    questions = plan_questions(fault_seed, QUESTIONS, reference.named("raw-2000").prompt)
    answers = await ask_in_peace(http, cluster.url, questions, STREAMS)
    watch = Watch(http, cluster.url, cluster.bootstrap_url)
    before = {status.member.worker: status.member.epoch for status in cluster.workers()}
    crowd = Crowd(http, cluster.url, questions, answers, NO_OUTAGE, fault_seed)
    async with crowd.of(STREAMS):
        output = await restart_all(cluster)
    records = await watch.records(each.reading for each in crowd.judged)
    assert not crowd.failures, tell(crowd.failures, records, [], crowd.begun)
    after = {status.member.worker: status.member.epoch for status in cluster.workers()}
    assert after.keys() == before.keys() and all(after[worker] > before[worker] for worker in before), output
    print(f"{output}{len(crowd.judged)} requests")
    cluster.wait_idle()
    status = await watch.status()
    assert status is not None and status.at_rest, status


async def restart_all(cluster):
    """What the command prints; fails with it, if it fails."""
    command = [sys.executable, "-m", "deploy.cli", "restart", "--topology", str(cluster.log_dir / "topology.yaml")]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()

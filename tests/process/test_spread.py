"""The demo model on ranks of several hosts, all of which this machine plays: the same tokens, whichever host dies."""

from __future__ import annotations

import psutil
import pytest

from bench.cluster import Cluster
from cluster.errors import LaunchError
from tests.process.api import Api, eventually
from tests.process.conftest import FLOAT32, TOPOLOGIES
from tests.process.reader import Reader
from tests.process.test_shards import LONG_ENOUGH, LONGEST_SILENCE, expect_reference_tokens, http

__all__ = ["http"]

pytestmark = [pytest.mark.shards, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Prefill with a stage on each of two hosts hands over to decode with half of the heads on each of two others."""
    sizes = ("prefill.pipeline_parallel=2", "prefill.nodes=2", "decode.tensor_parallel=2", "decode.nodes=2")
    with Cluster(TOPOLOGIES / "demo.yaml", (*FLOAT32, *sizes), tmp_path_factory.mktemp("spread")) as cluster:
        yield cluster


def process_of(cluster: Cluster, worker: str, node: int) -> psutil.Process:
    """What of the worker is on that host: the control process on the first, a rank host on any other."""
    role, _, index = worker.partition("-")
    launcher = psutil.Process(cluster.tree.pids()["bootstrap"]).parent()
    for process in launcher.children():
        words = process.cmdline()
        of_worker = f"{role}_worker" in words and words[words.index("--index") + 1] == index
        if of_worker and (words[words.index("--node") + 1] if "--node" in words else "0") == str(node):
            return process
    raise LaunchError(f"{worker} has no process on host {node}")


def epoch(cluster: Cluster, worker: str) -> int:
    """0 while it is not ready."""
    found = {status.member.worker: status for status in cluster.workers()}
    return found[worker].member.epoch if worker in found and found[worker].load.ready else 0


async def test_ranks_on_several_hosts_give_the_tokens_of_one(spread, http, reference):
    await expect_reference_tokens(Api(http, spread.url), reference)


@pytest.mark.parametrize(("worker", "node"), [("prefill-0", 1), ("decode-0", 1), ("decode-0", 0)])
async def test_a_request_survives_the_death_of_a_host_of_its_worker(worker, node, spread, http, reference):
    api, prompt = Api(http, spread.url), reference.named("raw-513").prompt
    greedy = (await api.stream(prompt, ignore_eos=True, **LONG_ENOUGH)).tokens
    before = epoch(spread, worker)
    reader = Reader(api, prompt, **LONG_ENOUGH)
    await reader.decode_worker()
    process_of(spread, worker, node).kill()
    await reader.task
    assert reader.tokens == greedy

    async def replaced() -> bool:
        async with http.get(f"{spread.url}/health") as health:
            return epoch(spread, worker) > before and health.status == 200

    await eventually(replaced, f"{worker} is back", LONGEST_SILENCE)
    assert (await api.stream(prompt, ignore_eos=True, **LONG_ENOUGH)).tokens == greedy
    spread.wait_idle(60.0)

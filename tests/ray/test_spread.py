"""A worker whose ranks are on both nodes of Ray: the same tokens, and back again after the loss of one."""

import pytest

from deploy.launchers.base import ReplicaState
from tests.process.api import Api
from tests.process.conftest import FLOAT32, TOPOLOGIES
from tests.process.test_shards import expect_reference_tokens
from tests.ray.cluster import running
from tests.ray.nodes import SECOND_ADDRESS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SIZES = ("decode.tensor_parallel=2", "decode.nodes=2")


async def test_a_worker_on_both_nodes_gives_the_tokens_of_one_and_outlives_a_node(http, reference, ray_nodes, tmp_path):
    settings = (*FLOAT32, *SIZES, "launch=ray", f"ray.address={ray_nodes.address}")
    async with running(TOPOLOGIES / "demo.yaml", settings, tmp_path / "run") as cluster:
        (before,) = [each for each in await cluster.until_ready(4) if each.name == "decode-0"]
        assert SECOND_ADDRESS in before.node and len(set(before.node.split(", "))) == 2, "one rank on each"
        await expect_reference_tokens(Api(http, cluster.url), reference)
        ray_nodes.kill_second()
        await cluster.until_all(lambda found: _has(found, ReplicaState.WAITING, "2 nodes with 1 CPU free on each"))
        ray_nodes.start_second()
        (after,) = [each for each in await cluster.until_ready(4) if each.name == "decode-0"]
        assert after.instance != before.instance and SECOND_ADDRESS in after.node
        await expect_reference_tokens(Api(http, cluster.url), reference)


def _has(found, state: ReplicaState, reason: str) -> bool:
    return any(each.name == "decode-0" and each.state is state and reason in each.reason for each in found)

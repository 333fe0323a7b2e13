"""Ray as a place that runs processes: actors that say hello, and end as they are told to."""

import asyncio
import json
import os

import psutil
import pytest
import ray

from cluster.errors import LaunchError
from cluster.messages import Role
from deploy.launchers.base import ProcessKind
from deploy.launchers.processes import ProcessSpec
from deploy.launchers.ray import RayProcesses
from deploy.launchers.ray_host import Parcel
from deploy.launchers.ray_topology import Need
from tests.process.runner_conformance import *  # noqa: F403
from tests.process.runner_conformance import PATIENCE, Stage
from tests.ray.conftest import STAND_INS
from tests.ray.nodes import SECOND_ADDRESS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NEEDS = {Role.PREFILL: Need({"CPU": 1.0, "GPU": 1.0}, ranks=2), Role.DECODE: Need({"CPU": 1.0}, ranks=1)}
PARCEL = Parcel("model: {path: nowhere}", {"SECRET_OF_THE_TEST": "whatever"})


@pytest.fixture(scope="module")
def connection(ray_nodes):
    environment = {"env_vars": {"PYTHONPATH": str(STAND_INS)}}
    ray.init(address=ray_nodes.address, runtime_env=environment, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
async def stage(connection, tmp_path):
    runner = RayProcesses(tmp_path, (), NEEDS, PARCEL)
    yield Stage(runner)
    await runner.stop([status.name for status in runner.status()], grace_seconds=0)


async def told(stage: Stage, kind: ProcessKind) -> dict:
    """What a worker of that pool is given."""
    await stage.runner.start(ProcessSpec("a", kind, "teller", ("--index", "3")))
    assert (await asyncio.wait_for(stage.runner.next_exit(), PATIENCE)).code == 0
    return json.loads(stage.runner.log_tail("a", 1)[0])


async def test_a_worker_knows_the_address_of_its_node_its_topology_and_the_secret(stage):
    found = await told(stage, ProcessKind.DECODE)
    topology, *rest = found["arguments"][1:]
    address = found["arguments"][-1]
    assert rest == ["--index", "3", "--host", address] and address in (ray.util.get_node_ip_address(), SECOND_ADDRESS)
    assert found["environment"]["SECRET_OF_THE_TEST"] == "whatever"
    assert not os.access(topology, os.F_OK), "what was written on the node is gone with the worker"


async def test_the_gpus_of_all_ranks_are_those_of_one_node_and_the_worker_sees_them_all(stage):
    found = await told(stage, ProcessKind.PREFILL)
    assert sorted(found["environment"]["CUDA_VISIBLE_DEVICES"].split(",")) == ["0", "1"]
    again = await told(stage, ProcessKind.PREFILL)
    assert again["arguments"][-1] != SECOND_ADDRESS, "the other node has none; and what was reserved is free again"


async def test_who_finds_no_place_waits_for_it_and_says_so(connection, tmp_path):
    needs = {Role.DECODE: Need({"CPU": 1.0, "unobtainium": 2.0}, ranks=1)}
    runner = RayProcesses(tmp_path, (), needs, PARCEL)
    await runner.start(ProcessSpec("a", ProcessKind.DECODE, "bystander", ()))
    (status,) = runner.status()
    assert status.running and status.waiting_for == "a node with 1 CPU and 2 unobtainium free"
    await asyncio.wait_for(runner.stop(["a"], grace_seconds=PATIENCE), PATIENCE)
    assert not runner.status()[0].running


async def test_what_ray_can_not_reserve_is_a_launch_error(connection, tmp_path):
    runner = RayProcesses(tmp_path, (), {Role.DECODE: Need({"GPU": 1.5}, ranks=1)}, PARCEL)
    with pytest.raises(LaunchError, match=r"a can't be started: .*1\.5"):
        await runner.start(ProcessSpec("a", ProcessKind.DECODE, "bystander", ()))


async def test_the_secret_is_in_nothing_that_ray_writes_or_lists(stage, tmp_path, ray_nodes):
    parcel = Parcel("model: {path: nowhere}", {"SECRET_OF_THE_TEST": "a-secret-nobody-should-read"})
    runner = RayProcesses(tmp_path, (), NEEDS, parcel)
    await runner.start(ProcessSpec("b", ProcessKind.DECODE, "bystander", ("0",)))
    await asyncio.wait_for(runner.next_exit(), PATIENCE)
    written = [file for file in ray_nodes.folder.rglob("*") if file.is_file()]
    assert len(written) > 10
    assert [file for file in written if b"a-secret-nobody-should-read" in file.read_bytes()] == []
    listed = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not any("a-secret-nobody-should-read" in line for line in listed)


async def test_the_worker_of_a_lost_node_is_told_as_lost_and_may_start_elsewhere(connection, tmp_path, ray_nodes):
    needs = {Role.DECODE: Need({"CPU": 1.0, "second": 1.0}, ranks=1), Role.PREFILL: Need({"CPU": 1.0}, ranks=1)}
    runner = RayProcesses(tmp_path, (), needs, PARCEL)
    await runner.start(ProcessSpec("a", ProcessKind.DECODE, "bystander", ()))
    await asyncio.wait_for(Stage(runner).hears("a"), PATIENCE)
    ray_nodes.kill_second()
    try:
        end = await asyncio.wait_for(runner.next_exit(), PATIENCE)
        assert end.name == "a" and end.lost and end.code < 0, end
        assert runner.log_tail("a", 5) == ["hello"], "what it said is not lost"
        await runner.start(ProcessSpec("b", ProcessKind.PREFILL, "bystander", ()))
        await asyncio.wait_for(Stage(runner).hears("b"), PATIENCE)
        assert SECOND_ADDRESS not in runner.status()[1].node
    finally:
        await runner.stop(["a", "b"], grace_seconds=PATIENCE)
        ray_nodes.start_second()

"""Requests that no one would send by hand: schemathesis reads the cluster's own OpenAPI document and tries."""

import asyncio
import sys
from pathlib import Path

import pytest

from bench.cluster import Cluster
from tests.process.conftest import TOPOLOGIES

SECONDS = 20
SMALL = (
    "model.context_length=64",
    "kv.pool_tokens=4096",
    "router.default_max_tokens=4",
    "router.max_choices=2",
)
"""Whatever is asked for, the answer is short: time goes into requests, not into tokens."""


@pytest.fixture(scope="module")
def small_cluster(tmp_path_factory):
    with Cluster(TOPOLOGIES / "demo.yaml", SMALL, tmp_path_factory.mktemp("small-cluster")) as cluster:
        yield cluster


async def test_no_request_makes_a_server_error(small_cluster):
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{small_cluster.url}/openapi.json",
        "--checks=not_a_server_error,status_code_conformance,content_type_conformance",
        "--phases=examples,coverage,fuzzing",
        f"--max-time={SECONDS}",
        "--max-examples=40",
        "--seed=1",
        "--no-color",
        "--continue-on-failure",
        "--request-timeout=20",
    ]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()[-6000:]
    small_cluster.wait_idle()

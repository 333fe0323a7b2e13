"""Clusters that tests share, because a start takes as long as ten tests."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from bench.cluster import Cluster
from tests.process.api import Api
from tests.process.processes import Processes
from tests.process.reference.cases import load_reference

TOPOLOGIES = Path(__file__).parents[2] / "deploy" / "topologies"
FLOAT32 = ("model.dtype=float32", "kv.pool_tokens=24576")
"""Exact enough to compare tokens; 1.1 GiB of KV a worker."""


@pytest.fixture(scope="session")
def demo_cluster(tmp_path_factory):
    """1P1D in float32 over NIXL, all session long. Tests leave it idle."""
    with Cluster(TOPOLOGIES / "demo.yaml", FLOAT32, tmp_path_factory.mktemp("demo-cluster")) as cluster:
        yield cluster


@pytest.fixture
async def http():
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=100)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@pytest.fixture
def api(http, demo_cluster):
    return Api(http, demo_cluster.url)


@pytest.fixture(scope="session")
def reference():
    return load_reference()


@pytest.fixture(scope="session")
def oracle():
    """transformers itself; seconds to load, and it is slow."""
    from tests.process.reference.oracle import Oracle

    return Oracle()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Puts the last lines of a failed test's clusters into its report."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, (Cluster, Processes)):
                report.sections.append((f"logs of {name}", value.tail()))
    return report
